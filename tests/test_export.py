"""The ONNX file of a checkpoint, used with onnxruntime alone and by inference.py."""
import importlib.util
import json
import shutil

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from conftest import FAST

from core.errors import InputError
from core.images import read_image
from core.labels import PROBABILITIES
from core.layout import read_eval
from core.onnx_model import export_onnx
from dataset import CropResize
from model import load_model


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained / "checkpoint-9", tmp_path / "checkpoint-9")


def read_probs(path):
    return pd.read_csv(path)[PROBABILITIES].to_numpy()


def predict(command, model_dir, *flags):
    return command("inference", "--model_dir", model_dir, "--valid_batch_size", "7", "--no-amp",
                   "--save_probs", "p.csv", *flags)


def test_engines_agree_and_the_file_is_exported_once(command, checkpoint, tmp_path):
    by_torch = predict(command, checkpoint)
    assert by_torch.returncode == 0, by_torch.stderr
    submission = (tmp_path / "submission.csv").read_text()
    expected = read_probs(tmp_path / "p.csv")
    first = predict(command, checkpoint, "--engine", "onnxruntime")
    assert first.returncode == 0 and "exporting" in first.stdout, first.stderr
    assert np.abs(read_probs(tmp_path / "p.csv") - expected).max() < 1e-4
    assert (tmp_path / "submission.csv").read_text() == submission
    second = predict(command, checkpoint, "--engine", "onnxruntime")
    assert second.returncode == 0 and "exporting" not in second.stdout
    # A damaged file is named, not used.
    file = checkpoint / "model.onnx"
    file.write_bytes(file.read_bytes()[:999])
    result = predict(command, checkpoint, "--engine", "onnxruntime")
    assert result.returncode == 2
    assert "model.onnx: not an ONNX model, or damaged" in result.stderr
    assert "delete it" in result.stderr


def test_file_of_other_weights_is_exported_again(command, checkpoint, trained, tmp_path):
    result = command("tools.export", "--model_dir", trained / "checkpoint-5",
                     "--output", checkpoint / "model.onnx")
    assert result.returncode == 0, result.stderr
    result = predict(command, checkpoint, "--engine", "onnxruntime")
    assert result.returncode == 0 and "exporting" in result.stdout
    by_onnx = read_probs(tmp_path / "p.csv")
    assert predict(command, checkpoint).returncode == 0
    assert np.abs(read_probs(tmp_path / "p.csv") - by_onnx).max() < 1e-4


@pytest.mark.parametrize("backbone", [[], ["--model", "test_vit", "--resize", "32", "32"]])
def test_file_takes_any_number_of_photos_and_its_metadata_says_how_to_prepare_them(
        command, dataset, tmp_path, backbone):
    result = command("train", "--data_dir", dataset, *FAST, *backbone, "--epochs", "1",
                     "--lr", "3e-3")
    assert result.returncode == 0, result.stderr
    result = command("tools.export", "--model_dir", "results", "--output", "deployed.onnx")
    assert result.returncode == 0 and "wrote deployed.onnx" in result.stdout, result.stderr

    session = onnxruntime.InferenceSession(tmp_path / "deployed.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert "centre crop" in metadata["preprocessing"] and len(metadata["weights_sha256"]) == 64
    classes, size, crop, tta = (json.loads(metadata[key])
                                for key in ("classes", "size", "crop", "tta"))
    assert classes[17] == "not wear, female, >=60" and tta == "hflip"
    crop_resize = CropResize(size, crop)
    photos = np.stack([crop_resize(read_image(path)) for path in read_eval(dataset).path])

    assert predict(command, "results", "--tta", "none").returncode == 0
    expected = read_probs(tmp_path / "p.csv")
    for part in (slice(0, 20), slice(4, 5)):
        found, = session.run(None, {"images": photos[part]})
        assert found.dtype == np.float32 and np.abs(found - expected[part]).max() < 1e-4


def test_a_missing_package_is_named(monkeypatch, checkpoint):
    model, config = load_model(checkpoint)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package onnx,.*pip install -r requirements-onnx\.txt"):
        export_onnx(model, config, checkpoint, checkpoint / "model.onnx")
    assert not (checkpoint / "model.onnx").exists()


def test_mixed_precision_is_refused_by_onnxruntime(command, checkpoint):
    result = predict(command, checkpoint, "--engine", "onnxruntime", "--amp")
    assert result.returncode == 2
    assert "--engine onnxruntime predicts on the CPU" in result.stderr
    assert "--engine torch" in result.stderr
