"""The ONNX file of a checkpoint, used as a stranger would with onnxruntime alone, and by inference.py."""
import importlib.util
import json
import shutil

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from conftest import FAST

import export
from dataset import Geometry
from errors import InputError
from layout import read_eval, read_image

FLAGS = ["--valid_batch_size", "7", "--save_probs", "p.csv"]


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained / "checkpoint-9", tmp_path / "checkpoint-9")


def read(path):
    return pd.read_csv(path).filter(regex=r"^p\d+$").to_numpy()


def test_engines_agree_and_the_file_is_made_once(command, checkpoint, tmp_path):
    by_torch = command("inference", "--model_dir", checkpoint, *FLAGS)
    assert by_torch.returncode == 0, by_torch.stderr
    submission, expected = (tmp_path / "submission.csv").read_text(), read(tmp_path / "p.csv")
    first = command("inference", "--model_dir", checkpoint, *FLAGS, "--engine", "onnxruntime")
    assert first.returncode == 0 and "exporting" in first.stdout, first.stderr
    assert np.abs(read(tmp_path / "p.csv") - expected).max() < 1e-4 and (tmp_path / "submission.csv").read_text() == submission
    second = command("inference", "--model_dir", checkpoint, *FLAGS, "--engine", "onnxruntime")
    assert second.returncode == 0 and "exporting" not in second.stdout
    (checkpoint / "model.onnx").write_bytes((checkpoint / "model.onnx").read_bytes()[:999])
    result = command("inference", "--model_dir", checkpoint, *FLAGS, "--engine", "onnxruntime")
    assert result.returncode == 2 and "model.onnx: not an ONNX model, or damaged" in result.stderr


def test_file_of_other_weights_is_exported_again(command, checkpoint, trained, tmp_path):
    assert command("export", "--model_dir", trained / "checkpoint-5", "--output", checkpoint / "model.onnx").returncode == 0
    result = command("inference", "--model_dir", checkpoint, *FLAGS, "--engine", "onnxruntime")
    assert result.returncode == 0 and "exporting" in result.stdout
    again = read(tmp_path / "p.csv")
    assert command("inference", "--model_dir", checkpoint, *FLAGS).returncode == 0
    assert np.abs(read(tmp_path / "p.csv") - again).max() < 1e-4


@pytest.mark.parametrize("backbone", [["--head", "flat"], ["--model", "test_vit", "--resize", "32", "32"]])
def test_file_takes_photos_of_any_number_and_tells_how_to_make_them(command, dataset, tmp_path, backbone):
    assert command("train", "--data_dir", dataset, *FAST, *backbone, "--epochs", "1", "--lr", "3e-3").returncode == 0
    result = command("export", "--model_dir", "results", "--output", "deployed.onnx")
    assert result.returncode == 0 and "wrote deployed.onnx" in result.stdout, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "deployed.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert "centre crop" in metadata["preprocessing"] and len(metadata["weights_sha256"]) == 64
    metadata = {key: json.loads(value) for key, value in metadata.items() if key not in ("weights_sha256", "preprocessing")}
    assert metadata["classes"][17] == "not wear, female, >=60" and metadata["tta"] == "hflip"
    geometry = Geometry(metadata["size"], metadata["crop"])
    photos = np.stack([geometry(read_image(path)) for path in read_eval(dataset).path])
    assert command("inference", "--model_dir", "results", "--tta", "none", "--save_probs", "p.csv").returncode == 0
    expected = read(tmp_path / "p.csv")
    for part in (slice(0, 20), slice(4, 5)):
        found, = session.run(None, {"images": photos[part]})
        assert found.dtype == np.float32 and np.abs(found - expected[part]).max() < 1e-4


def test_missing_package_is_said_in_one_line(monkeypatch, checkpoint):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-onnx\.txt"):
        export.export_onnx(checkpoint, checkpoint / "model.onnx")


def test_what_it_cannot_do_is_said(command, checkpoint):
    result = command("inference", "--model_dir", checkpoint, "--engine", "onnxruntime", "--amp")
    assert result.returncode == 2 and "--engine onnxruntime predicts on the CPU" in result.stderr
