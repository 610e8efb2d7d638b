import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import FAST
from PIL import Image

from checkpoint import find_checkpoint
from dataset import Geometry
from layout import list_images, read_eval, read_image


def predict(command, *flags):
    result = command("inference", "--num_workers", "0", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def probabilities(path):
    return pd.read_csv(path).set_index("ImageID").filter(regex=r"^p\d+$")


def test_submission_for_the_data_it_was_trained_on(command, trained, dataset, tmp_path):
    out = predict(command, f"--model_dir={trained}/checkpoint-5")
    table, info = pd.read_csv(tmp_path / "submission.csv"), pd.read_csv(dataset / "eval" / "info.csv")
    assert list(table.columns) == ["ImageID", "ans"] and table.ImageID.tolist() == info.ImageID.tolist()
    assert table["ans"].between(0, 17).all() and table["ans"].dtype == np.int64
    score = re.search(r"score it: python (\S+).py (.*)", out)
    result = command(score[1], *score[2].split())
    assert result.returncode == 0 and "macro F1" in result.stdout


def test_inference_repeats_validation_exactly(command, trained, dataset, tmp_path):
    """The stock baseline's mismatch of preprocessing between training and inference cost its users 0.10 F1."""
    valid = pd.read_csv(trained / "checkpoint-9" / "valid_predictions.csv")
    paths = [dataset / "train" / "images" / image_id for image_id in valid.ImageID]
    predict(command, "--model_dir", trained / "checkpoint-9", "--save_probs", "p.csv", "--data_dir", *paths)
    again = probabilities(tmp_path / "p.csv").loc[[str(path) for path in paths]]
    assert np.abs(again.to_numpy() - valid.filter(regex=r"^p\d+$").to_numpy()).max() < 2e-6


def test_inference_repeats_validation_in_mixed_precision(command, dataset, tmp_path):
    assert command("train", "--data_dir", dataset, *FAST, "--epochs", "1", "--lr", "3e-3", "--amp").returncode == 0
    valid = pd.read_csv(tmp_path / "results/valid_predictions.csv")
    paths = [dataset / "train" / "images" / image_id for image_id in valid.ImageID]
    for name, flags in [("as_trained", []), ("full", ["--no-amp"])]:
        predict(command, "--model_dir", "results", "--save_probs", f"{name}.csv", "--data_dir", *paths, *flags)
    as_trained, full = (np.abs(probabilities(tmp_path / f"{name}.csv").loc[list(map(str, paths))].to_numpy()
                               - valid.filter(regex=r"^p\d+$").to_numpy()).max() for name in ("as_trained", "full"))
    assert as_trained < 2e-6 and full > 2e-5


@pytest.mark.parametrize("head", ["factored", "flat"])
def test_probabilities_are_those_of_the_timm_model_on_the_same_photo(command, dataset, tmp_path, head):
    flags = [*FAST, "--head", head, "--epochs", "1", "--lr", "3e-3"]
    assert command("train", "--data_dir", dataset, *flags).returncode == 0
    folder = tmp_path / "results" / "checkpoint-9"
    predict(command, "--model_dir", folder, "--save_probs", "p.csv", "--tta", "hflip")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    photo = read_eval(dataset).iloc[7]
    pixels = torch.from_numpy(Geometry(cfg["input_size"][1:], (0.9, 0.8))(read_image(photo.path))).permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.inference_mode():
        expected = (model(pixels).softmax(1) + model(pixels.flip(3)).softmax(1)) / 2
    assert probabilities(tmp_path / "p.csv").loc[photo.ImageID].to_numpy() == pytest.approx(expected[0].numpy(), abs=1e-5)


def test_results_folder_means_its_best(trained):
    state = json.loads((trained / "checkpoint-9" / "trainer_state.json").read_text())
    assert find_checkpoint(trained).name == f"checkpoint-{state['best_step']}"


def test_ensemble_of_two_backbones_at_two_sizes_is_the_weighted_mean(command, trained, dataset, tmp_path):
    flags = [*FAST, "--model", "test_vit", "--resize", "48", "32", "--crop", "0.8", "0.9", "--epochs", "1"]
    assert command("train", "--data_dir", dataset, *flags, "--output_dir", "vit").returncode == 0
    for name, flags in [("a", [trained]), ("b", ["vit"]), ("ab", [trained, "vit", "--model_weights", "1", "3"])]:
        out = predict(command, "--model_dir", *flags, "--save_probs", f"{name}.csv", "--output", f"s{name}.csv")
    a, b, ab = (probabilities(tmp_path / f"{name}.csv") for name in ("a", "b", "ab"))
    assert np.abs((a + 3 * b) / 4 - ab).to_numpy().max() < 1e-6
    assert pd.read_csv(tmp_path / "sab.csv")["ans"].tolist() == ab.to_numpy().argmax(1).tolist()
    for member in (a, b):
        assert f"differs from the vote on {(member.to_numpy().argmax(1) != ab.to_numpy().argmax(1)).mean():.1%} of" in out


def test_any_folder_of_photos_gives_a_readable_table(command, trained, tmp_path):
    photos = tmp_path / "my photos"
    (photos / "trip").mkdir(parents=True)
    for name, mode, size in [("b.png", "RGBA", (50, 80)), ("a.jpg", "L", (300, 100)), ("trip/c.JPEG", "RGB", (64, 64))]:
        Image.new(mode, size).save(photos / name)
    (photos / "._a.jpg").write_bytes(b"x")
    (photos / "notes.txt").write_text("x")
    predict(command, "--model_dir", trained, "--data_dir", photos)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.ImageID.tolist() == ["a.jpg", "b.png", "trip/c.JPEG"]
    assert set(table["mask"]) <= {"wear", "incorrect", "not wear"} and set(table.gender) <= {"male", "female"}
    assert table.probability.between(0, 1).all() and (table.mask_probability >= table.probability - 1e-4).all()


def test_batch_size_and_workers_change_no_prediction(command, trained, tmp_path):
    predict(command, "--model_dir", trained, "--save_probs", "a.csv")
    predict(command, "--model_dir", trained, "--save_probs", "b.csv", "--valid_batch_size", "3", "--num_workers", "2")
    assert np.abs(probabilities(tmp_path / "a.csv") - probabilities(tmp_path / "b.csv")).to_numpy().max() < 1e-6


def test_data_moved_away_is_said(command, trained, dataset, tmp_path):
    folder = shutil.copytree(trained / "checkpoint-5", tmp_path / "checkpoint-5")
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["eval_dir"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    result = command("inference", "--model_dir", folder)
    assert result.returncode == 2 and "gone" in result.stderr and "--data_dir" in result.stderr
    result = command("inference", "--model_dir", folder, "--data_dir", dataset / "eval" / "images")
    assert result.returncode == 0, result.stderr
    result = command("inference", "--model_dir", trained, folder)  # never the eval part of the first for both
    assert result.returncode == 2 and "another eval part" in result.stderr and "gone" in result.stderr


def test_photos_of_several_folders_and_of_any_name_each_keep_a_row(command, trained, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 50)).save(tmp_path / folder / "same.jpg")
    shutil.copy(tmp_path / "one" / "same.jpg", os.fsencode(tmp_path / "two") + b"/\xb0\xa1.jpg")  # CP949, as old archives hold
    predict(command, "--model_dir", trained, "--data_dir", "one", "two")
    assert pd.read_csv(tmp_path / "predictions.csv").ImageID.tolist() == ["one/same.jpg", "two/same.jpg", "two/\\xb0\\xa1.jpg"]


def test_list_images_does_not_depend_on_the_order_of_arguments(dataset):
    files = sorted((dataset / "eval" / "images").iterdir())
    assert list_images(files).ImageID.tolist() == list_images(files[::-1]).ImageID.tolist()
