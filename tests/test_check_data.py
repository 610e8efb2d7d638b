"""What `check_data.py` finds in a spoilt dataset, and what training does about it."""
import json
import shutil

import numpy as np
import pandas as pd
from conftest import FAST
from PIL import Image


def spoil(root):
    """A truncated photo, a text file, a copy under another person, a copy in the eval part, a gray photo; the files to be named."""
    people = sorted(path for path in (root / "train" / "images").iterdir())
    truncated, text = people[0] / "mask1.jpg", people[3] / "normal.jpg"
    truncated.write_bytes(truncated.read_bytes()[:300])
    text.write_text("not a photo")
    copied = people[5] / "mask2.jpg"
    shutil.copy(people[4] / "mask2.jpg", copied)
    shutil.copy(people[5] / "mask3.jpg", people[5] / "mask4.jpg")  # the same person: nothing to name
    leaked = sorted((root / "eval" / "images").iterdir())[2]
    shutil.copy(people[6] / "normal.jpg", leaked)
    Image.open(people[7] / "mask1.jpg").convert("L").save(people[7] / "mask1.jpg")
    return [truncated, text], [copied, leaked]


def test_everything_that_is_wrong_is_named_at_once(command, copy):
    assert command("check_data", copy).returncode == 0
    bad, repeated = spoil(copy)
    result = command("check_data", copy)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    for path in bad:
        assert len([line for line in lines if line.startswith(f"{path}: cannot be decoded")]) == 1
    for path in repeated:
        assert len([line for line in lines if line.startswith(f"{path}: the same photo as")]) == 1
    assert lines[-1] == "188 photos: 2 cannot be used, 2 occur again with another person or part"
    assert "train: 168 photos of 24 people" in lines and "eval: 20 photos" in lines
    assert "modes: RGB (185), ? (2), L (1)" in lines and "sizes: 24 x 32 (186), ? (2)" in lines


def test_a_folder_of_photos_and_what_is_no_dataset(command, copy):
    person = next(path for path in (copy / "train" / "images").iterdir())
    assert "photos: 7 photos\n" in command("check_data", person).stdout
    result = command("check_data", "nowhere")
    assert result.returncode == 2 and "nowhere: no such file or folder" in result.stderr


def test_training_points_to_it_or_skips_what_it_names(command, copy, tmp_path):
    bad, _ = spoil(copy)
    result = command("train", "--data_dir", copy, *FAST, "--epochs", "1")
    assert result.returncode == 2 and "check_data.py" in result.stderr
    flags = ["--data_dir", copy, *FAST, "--epochs", "1", "--on_bad_image", "skip", "--overwrite"]
    result = command("train", *flags)
    assert result.returncode == 0, result.stderr
    assert "2 of 168 photos skipped" in result.stdout and all(f"skipped: {path}" in result.stdout for path in bad)
    state = json.loads(next((tmp_path / "results").glob("checkpoint-*/trainer_state.json")).read_text())
    config = json.loads(next((tmp_path / "results").glob("checkpoint-*/config.json")).read_text())
    valid = pd.read_csv(tmp_path / "results" / "valid_predictions.csv")
    assert np.sum(config["mask_classification"]["class_counts"]) + len(valid) == 166
    assert state["args"]["on_bad_image"] == "skip"
