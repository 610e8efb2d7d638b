"""inference.py: the same probabilities as validation and as timm, ensembles, any photos."""
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import DEVICE, FAST, run_printed, tolerance
from PIL import Image

from core.checkpoint import find_checkpoint
from core.images import read_image
from core.labels import PROBABILITIES
from core.layout import list_images, read_eval
from dataset import CropResize

# Largest differences of probabilities that rounding explains on CUDA, where two processes may use
# two algorithms for the same layer.
FLOAT32, BFLOAT16 = 1e-5, 2e-3


def predict(command, *flags):
    result = command("inference", "--num_workers", "0", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def train(command, dataset, *flags):
    result = command("train", "--data_dir", dataset, *FAST, "--epochs", "1", "--lr", "3e-3", *flags)
    assert result.returncode == 0, result.stderr


def read_probs(path):
    return pd.read_csv(path).set_index("ImageID")[PROBABILITIES]


def largest_difference(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def difference_from_validation(command, checkpoint, dataset, tmp_path, *flags):
    """Predict the validation photos; return the largest difference from valid_predictions.csv."""
    valid = pd.read_csv(checkpoint / "valid_predictions.csv")
    paths = [str(dataset / "train" / "images" / image_id) for image_id in valid.ImageID]
    predict(command, "--model_dir", checkpoint, "--save_probs", "p.csv", "--data_dir", *paths,
            *flags)
    return largest_difference(read_probs(tmp_path / "p.csv").loc[paths], valid[PROBABILITIES])


def test_submission_for_the_eval_part_of_the_training_data(command, trained, dataset, tmp_path):
    out = predict(command, f"--model_dir={trained}/checkpoint-5")
    table = pd.read_csv(tmp_path / "submission.csv")
    assert list(table.columns) == ["ImageID", "ans"]
    assert table.ImageID.tolist() == pd.read_csv(dataset / "eval" / "info.csv").ImageID.tolist()
    assert table["ans"].between(0, 17).all() and table["ans"].dtype == np.int64
    # The command that it prints works as it is.
    result = run_printed(re.search(r"score it: (.*)", out)[1], tmp_path)
    assert result.returncode == 0 and "macro F1" in result.stdout


def test_inference_repeats_validation_exactly(command, trained, dataset, tmp_path):
    """In the stock baseline the two had different preprocessing, which cost 0.10 F1."""
    difference = difference_from_validation(command, trained / "checkpoint-9", dataset, tmp_path)
    assert difference < tolerance(2e-6, BFLOAT16)


def test_inference_repeats_validation_in_mixed_precision(command, dataset, tmp_path):
    train(command, dataset, "--amp")
    checkpoint = tmp_path / "results" / "checkpoint-9"
    difference = difference_from_validation(command, checkpoint, dataset, tmp_path)
    assert difference < tolerance(2e-6, BFLOAT16)
    assert difference_from_validation(command, checkpoint, dataset, tmp_path, "--no-amp") > 2e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a checkpoint that was trained on a GPU")
def test_a_checkpoint_from_a_gpu_predicts_on_the_cpu_as_in_validation(command, trained, dataset,
                                                                      tmp_path):
    difference = difference_from_validation(command, trained / "checkpoint-9", dataset, tmp_path,
                                            "--device", "cpu")
    assert difference < BFLOAT16


def test_probabilities_are_those_of_the_timm_model_on_the_same_photo(command, dataset, trained,
                                                                    tmp_path):
    folder = trained / "checkpoint-9"
    predict(command, "--model_dir", folder, "--save_probs", "p.csv", "--tta", "hflip", "--no-amp")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    photo = read_eval(dataset).iloc[7]
    pixels = CropResize(cfg["input_size"][1:], (0.9, 0.8))(read_image(photo.path))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = (image - mean) / std
    with torch.inference_mode():
        expected = (model(image).softmax(1) + model(image.flip(3)).softmax(1)) / 2
    found = read_probs(tmp_path / "p.csv").loc[[photo.ImageID]]
    assert largest_difference(found, expected) < tolerance(1e-5, FLOAT32)


def test_results_folder_means_its_best_checkpoint(trained):
    state = json.loads((trained / "checkpoint-9" / "trainer_state.json").read_text())
    assert find_checkpoint(trained).name == f"checkpoint-{state['best_step']}"


def test_ensemble_of_two_backbones_at_two_sizes_is_the_weighted_mean(command, trained, dataset,
                                                                     tmp_path):
    train(command, dataset, "--model", "test_vit", "--resize", "48", "32", "--crop", "0.8", "0.9",
          "--output_dir", "vit")
    for name, members in [("a", [trained]), ("b", ["vit"]),
                          ("ab", [trained, "vit", "--model_weights", "1", "3"])]:
        predict(command, "--model_dir", *members, "--save_probs", f"{name}.csv",
                "--output", f"s{name}.csv", "--no-amp")
    a, b, ab = (read_probs(tmp_path / f"{name}.csv") for name in ("a", "b", "ab"))
    assert largest_difference((a + 3 * b) / 4, ab) < tolerance(1e-6, FLOAT32)
    vote = pd.read_csv(tmp_path / "sab.csv")["ans"].tolist()
    assert vote == ab.to_numpy().argmax(1).tolist()


def test_any_folder_of_photos_gives_a_readable_table(command, trained, tmp_path):
    photos = tmp_path / "my photos"
    (photos / "trip").mkdir(parents=True)
    for name, mode, size in [("b.png", "RGBA", (50, 80)), ("a.jpg", "L", (300, 100)),
                             ("trip/c.JPEG", "RGB", (64, 64))]:
        Image.new(mode, size).save(photos / name)
    (photos / "._a.jpg").write_bytes(b"x")
    (photos / "notes.txt").write_text("x")
    predict(command, "--model_dir", trained, "--data_dir", photos)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.ImageID.tolist() == ["a.jpg", "b.png", "trip/c.JPEG"]
    assert set(table["mask"]) <= {"wear", "incorrect", "not wear"}
    assert set(table.gender) <= {"male", "female"}
    assert set(table.age) <= {"<30", "30-59", ">=60"}
    assert table.probability.between(0, 1).all()
    assert (table.mask_probability >= table.probability - 1e-4).all()


def test_batch_size_and_workers_change_no_prediction(command, trained, tmp_path):
    """Batches of 3 make the last one short of a photo: its padding must not show."""
    predict(command, "--model_dir", trained, "--no-amp", "--save_probs", "a.csv")
    predict(command, "--model_dir", trained, "--no-amp", "--save_probs", "b.csv",
            "--valid_batch_size", "3", "--num_workers", "2")
    a, b = (read_probs(tmp_path / f"{name}.csv") for name in "ab")
    assert a.index.tolist() == b.index.tolist() and len(a) == 20
    assert largest_difference(a, b) < tolerance(1e-6, FLOAT32)


def test_eval_part_that_was_moved_away_is_named(command, trained, dataset, tmp_path):
    folder = shutil.copytree(trained / "checkpoint-5", tmp_path / "checkpoint-5")
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["eval_dir"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    result = command("inference", "--model_dir", folder)
    assert result.returncode == 2 and "--data_dir" in result.stderr
    assert f"{tmp_path}/gone: the eval part of the checkpoint's training data is not there" \
        in result.stderr
    predict(command, "--model_dir", folder, "--data_dir", dataset / "eval" / "images")
    # Two members with different eval parts: the first one's is not used for both.
    result = command("inference", "--model_dir", trained, folder)
    assert result.returncode == 2 and "another eval part" in result.stderr
    assert "gone" in result.stderr and "--data_dir" in result.stderr


def test_photos_of_several_folders_and_with_any_file_name_have_a_row_each(command, trained,
                                                                         tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 50)).save(tmp_path / folder / "same.jpg")
    # A name in the encoding CP949, as old archives have it.
    shutil.copy(tmp_path / "one" / "same.jpg", os.fsencode(tmp_path / "two") + b"/\xb0\xa1.jpg")
    predict(command, "--model_dir", trained, "--data_dir", "one", "two")
    ids = pd.read_csv(tmp_path / "predictions.csv").ImageID.tolist()
    assert ids == ["one/same.jpg", "two/same.jpg", "two/\\xb0\\xa1.jpg"]


def test_list_images_does_not_depend_on_the_order_of_arguments(dataset):
    files = sorted((dataset / "eval" / "images").iterdir())
    assert list_images(files).ImageID.tolist() == list_images(files[::-1]).ImageID.tolist()
