"""The heat maps, and the page of tools.demo, with and without Gradio."""
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, tolerance
from PIL import Image
from torch import nn

import inference
from core.errors import InputError
from core.gradcam import grad_cam
from core.labels import PROBABILITIES
from tools import demo


class Places(nn.Module):
    """Two maps of 2 x 2 places; the logit of class 0 is mean(2 a - b), of class 1 mean(b)."""

    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(3, 2, 2, stride=2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():  # a is the red, b is the green of the upper left pixel
            self.maps.weight.zero_()
            self.maps.weight[0, 0, 0, 0] = self.maps.weight[1, 1, 0, 0] = 1
            self.head.weight.copy_(torch.tensor([[2.0, -1.0], [0.0, 1.0]]))

    def forward(self, images):
        return self.head(self.maps(images).mean(dim=(2, 3)))


def test_grad_cam_by_hand():
    image = torch.zeros(1, 3, 4, 4)
    image[0, :2, ::2, ::2] = torch.tensor([[[3.0, 1], [0, 2]], [[2.0, 4], [5, 0]]])
    # Gradients of class 0 are 2/4 and -1/4 at each place, so the map is (2 a - b) / 4, cut off
    # below 0 and divided by its maximum: (4, -2, -5, 4) becomes (1, 0, 0, 1). Bilinear by 2.
    heat = grad_cam(Places(), image, 0)
    assert heat.shape == (4, 4)
    assert heat[::3, ::3].tolist() == [[1, 0], [0, 1]]
    assert heat[0].tolist() == [1, 0.75, 0.25, 0]
    # Class 1: b / 4, which becomes (2, 4, 5, 0) / 5.
    assert grad_cam(Places(), image, 1)[::3, ::3] == pytest.approx(np.array([[0.4, 0.8], [1, 0]]))


def expected_heat(layer, model, image, label, to_maps):
    """Grad-CAM of a layer that is named, whose output `to_maps` brings to (C, h, w)."""
    outputs = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    logit = model(image)[0, label]
    hook.remove()
    gradient, = torch.autograd.grad(logit, outputs[-1])
    weights = to_maps(gradient).mean(dim=(1, 2))
    heat = torch.einsum("c,chw->hw", weights, to_maps(outputs[-1])).relu()[None, None]
    heat = nn.functional.interpolate(heat, image.shape[2:], mode="bilinear").detach()[0, 0]
    return heat / heat.max()


@pytest.mark.parametrize(("name", "find_layer", "to_maps"), [
    ("test_convnext", lambda model: model.stages[-1], lambda value: value[0]),
    # Tokens: the class token, then 6 x 4 patches of 16 pixels.
    ("test_vit", lambda model: model.blocks[-1].norm1,
     lambda value: value[0, 1:].T.reshape(-1, 6, 4)),
    # A Swin has the channels last.
    ("swin_tiny_patch4_window7_224", lambda model: model.norm,
     lambda value: value[0].permute(2, 0, 1)),
])
def test_grad_cam_chooses_the_last_layer_with_places(name, find_layer, to_maps):
    torch.manual_seed(0)
    args = {} if "convnext" in name else {"img_size": (96, 64)}
    model = timm.create_model(name, num_classes=18, **args).eval()
    image = torch.randn(1, 3, 96, 64)
    for label in (0, 1, 2):
        heat = grad_cam(model, image, label)
        expected = expected_heat(find_layer(model), model, image, label, to_maps)
        assert heat == pytest.approx(expected.nan_to_num().numpy(), abs=1e-5)


def test_a_model_without_places_has_no_heat_map():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 18))
    assert grad_cam(model, torch.randn(1, 3, 4, 4), 0) is None


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A checkpoint that knows no framing, so that no face is looked for."""
    folder = shutil.copytree(trained / "checkpoint-9", tmp_path / "checkpoint-9")
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["train_dir"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def photo(dataset):
    return sorted((dataset / "eval" / "images").iterdir())[3]


def check_answer(drawn_size, mask, gender, age, heat_size, checkpoint, photo, tmp_path):
    """Compare what the page shows with what inference.py writes."""
    assert drawn_size == (24, 32) and heat_size == (288, 384)
    probs = tmp_path / "p.csv"
    inference.main(["--model_dir", str(checkpoint), "--data_dir", str(photo), "--save_probs",
                    str(probs), "--output", str(tmp_path / "o.csv"), "--device", "cpu"])
    joint = pd.read_csv(probs)[PROBABILITIES].to_numpy().reshape(3, 2, 3)
    for found, axes in [(mask, (1, 2)), (gender, (0, 2)), (age, (0, 1))]:
        assert list(found.values()) == pytest.approx(
            joint.sum(axis=axes), abs=tolerance(1e-6, 2e-3))
    assert [*mask, *gender, *age] == ["mask worn", "mask worn incorrectly", "no mask", "male",
                                      "female", "under 30", "30 to 59", "60 and over"]


def test_the_page_shows_what_inference_predicts(checkpoint, photo, tmp_path):
    explainer = demo.Explainer(checkpoint)
    assert "aces are not looked for" in explainer.note  # no framing, or no detector
    drawn, *attributes, heat = explainer(photo)
    check_answer(drawn.size, *attributes, heat.shape[1::-1], checkpoint, photo, tmp_path)


def test_a_missing_package_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-demo\.txt"):
        demo.main(["--model_dir", str(checkpoint)])


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs requirements-demo.txt")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_no_photo_is_left_when_the_page_ends(checkpoint, tmp_path, number):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-m", "tools.demo", "--model_dir", checkpoint],
                               cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "http://127.0.0.1" in line and list(tmp_path.glob("tmp*"))
    process.send_signal(number)
    assert process.wait(60) == 128 + number and not list(tmp_path.glob("tmp*"))


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs requirements-demo.txt")
def test_a_photo_is_sent_to_the_page_and_the_answer_comes_back(checkpoint, photo, tmp_path,
                                                               monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from gradio_client import Client, handle_file
    page = demo.create_page(demo.Explainer(checkpoint))
    _, url, _ = page.launch(server_name="127.0.0.1", share=False, quiet=True, ssr_mode=False,
                            prevent_thread_lock=True)
    try:
        client = Client(url, verbose=False, download_files=tmp_path / "answers")
        drawn, *attributes, heat = client.predict(handle_file(photo), api_name="/predict")
        attributes = [{item["label"]: item["confidence"] for item in found["confidences"]}
                      for found in attributes]
        order = [("mask worn", "mask worn incorrectly", "no mask"), ("male", "female"),
                 ("under 30", "30 to 59", "60 and over")]
        attributes = [{name: found[name] for name in names}
                      for found, names in zip(attributes, order, strict=True)]
        check_answer(Image.open(drawn).size, *attributes, Image.open(heat).size, checkpoint, photo,
                     tmp_path)
    finally:
        page.close()
