"""What tools.check_data finds in a damaged dataset, and what training does about it."""
import json
import shutil

import numpy as np
import pandas as pd
from conftest import FAST
from PIL import Image


def spoil(root):
    """Damage a dataset; return (photos that cannot be decoded, copies of another photo).

    A gray photo and a copy within one person and label are no problem and must not be named.
    """
    people = sorted(path for path in (root / "train" / "images").iterdir())
    truncated, text = people[0] / "mask1.jpg", people[3] / "normal.jpg"
    truncated.write_bytes(truncated.read_bytes()[:300])
    text.write_text("not a photo")
    copied = people[5] / "mask2.jpg"
    shutil.copy(people[4] / "mask2.jpg", copied)
    shutil.copy(people[5] / "mask3.jpg", people[5] / "mask4.jpg")  # the same person and label
    relabelled = people[8] / "normal.jpg"  # a mask that is worn and not worn
    shutil.copy(people[8] / "mask1.jpg", relabelled)
    leaked = sorted((root / "eval" / "images").iterdir())[2]
    shutil.copy(people[6] / "normal.jpg", leaked)
    Image.open(people[7] / "mask1.jpg").convert("L").save(people[7] / "mask1.jpg")
    return [truncated, text], [copied, leaked, relabelled]


def test_all_problems_are_named_in_one_run(command, copy):
    assert command("tools.check_data", copy).returncode == 0
    bad, repeated = spoil(copy)
    result = command("tools.check_data", copy)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    for path in bad:
        assert len([line for line in lines if line.startswith(f"{path}: cannot be decoded")]) == 1
    for path in repeated:
        assert len([line for line in lines if line.startswith(f"{path}: the same photo as")]) == 1
    assert lines[-1] == ("188 photos: 2 cannot be decoded or are damaged, 3 occur again with "
                         "another person, label or part")
    assert "train: 168 photos of 24 people" in lines and "eval: 20 photos" in lines
    assert "width x height: 24 x 32 (186), ? (2)" in lines
    assert "modes: RGB (185), ? (2), L (1)" in lines


def test_any_photo_folder_can_be_checked_and_a_missing_one_is_named(command, copy):
    person = next(path for path in (copy / "train" / "images").iterdir())
    assert "photos: 7 photos\n" in command("tools.check_data", person).stdout
    result = command("tools.check_data", "nowhere")
    assert result.returncode == 2 and "nowhere: no such file or folder" in result.stderr


def test_training_recommends_the_check_or_skips_the_photos_that_it_names(command, copy, tmp_path):
    bad, _ = spoil(copy)
    result = command("train", "--data_dir", copy, *FAST, "--epochs", "1")
    assert result.returncode == 2 and "python -m tools.check_data" in result.stderr
    flags = ["--data_dir", copy, *FAST, "--epochs", "1", "--on_bad_image", "skip", "--overwrite"]
    result = command("train", *flags)
    assert result.returncode == 0, result.stderr
    assert "2 of 168 photos skipped" in result.stdout
    assert all(f"skipped: {path}" in result.stdout for path in bad)
    results = tmp_path / "results"
    folder = next(results.glob("checkpoint-*"))
    state = json.loads((folder / "trainer_state.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    valid = pd.read_csv(results / "valid_predictions.csv")
    assert np.sum(config["mask_classification"]["class_counts"]) + len(valid) == 166
    assert state["args"]["on_bad_image"] == "skip"
