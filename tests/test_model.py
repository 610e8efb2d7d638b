import pytest
import timm
import torch
from conftest import docstring_backbone
from safetensors.torch import save_file
from torch import nn

import model as m
from checkpoint import load_model, model_config, save_checkpoint
from dataset import Geometry
from errors import InputError
from layout import decode
from model import FactoredHead, create_model, inference_state

SIZE = (64, 48)


def state_for(step):
    return {"step": step, "best_step": step, "history": [], "args": {}}


def save(model, name, folder, size=SIZE):
    return save_checkpoint(folder, model, model_config(model, name, Geometry(size), "none", None, {}), state_for(1), None, {})


ARCHITECTURES = ["efficientnet_b4", "resnet18", "resnet", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "convnext_atto"]


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in ARCHITECTURES for head in ("flat", "factored")]
                         + [("vgg11", "factored")])  # half a gigabyte of weights: once is enough
def test_checkpoint_is_a_timm_folder_and_rebuilds_itself(name, head, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, SIZE, head).eval()
    with torch.no_grad():  # layers that start at zero would make any two models agree
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    photos = torch.randn(2, 3, *SIZE)
    folder = save(model, name, tmp_path)
    ours, config = load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        logits = model(photos)
        assert logits.shape == (2, 18) and logits.std() > 0
        assert torch.allclose(ours(photos), logits, atol=1e-5)
        assert torch.allclose(theirs(photos), logits, atol=1e-5)
    assert tuple(config["size"]) == SIZE


def test_factored_head_is_the_sum_of_its_parts():
    head = FactoredHead(5)
    features = torch.randn(4, 5)
    parts = nn.functional.linear(features, head.weight, head.bias)  # mask 0..2, gender 3..4, age 5..7
    logits = head(features)
    for label in range(18):
        mask, gender, age = decode(label)
        assert torch.allclose(logits[:, label], parts[:, mask] + parts[:, 3 + gender] + parts[:, 5 + age], atol=1e-6)


def test_attributes_are_independent_under_a_factored_head():
    p = FactoredHead(5)(torch.randn(1, 5)).softmax(1).reshape(3, 2, 3)
    product = p.sum((1, 2))[:, None, None] * p.sum((0, 2))[None, :, None] * p.sum((0, 1))[None, None, :]
    assert torch.allclose(p, product, atol=1e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_file_fills_the_backbone_and_leaves_the_head(suffix, tmp_path):
    source = timm.create_model("resnet18", num_classes=1000)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    model = create_model("resnet18", SIZE, "factored", str(path))
    assert torch.equal(model.conv1.weight, source.conv1.weight) and torch.equal(model.layer4[1].bn2.bias, source.layer4[1].bn2.bias)
    assert model.fc.weight.shape == (8, 512)


def test_weights_of_a_vit_fit_another_size(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_model("vit_tiny_patch16_224", (64, 48), weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert model.pos_embed.shape[1] == 1 + 4 * 3


def test_mismatched_weights_are_named(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    save_file({key: value for key, value in state.items() if key != "layer1.0.conv1.weight"}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight is missing"):
        create_model("resnet18", SIZE, weights=str(tmp_path / "a.safetensors"))
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"layer1\.2\..* is not in the model"):
        create_model("resnet18", SIZE, weights=str(tmp_path / "b.safetensors"))


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


def test_weights_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="not a file of tensors"):
        create_model("resnet18", SIZE, weights="bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_unknown_model_names_the_known_and_the_nearest():
    with pytest.raises(InputError, match=r"efficientnet_b4.*resnet18.*such as.*efficientnet_b5"):
        create_model("eficientnet_b5", SIZE)


def test_resnet_is_the_one_of_fifty_layers():
    own, timms = (sum(p.numel() for p in model.parameters()) for model in (create_model("resnet", SIZE), timm.create_model(
        "resnet50", num_classes=18)))
    assert own == timms


def test_a_timm_model_with_other_norms_is_built_as_its_checkpoint_will_be():
    create_model("efficientnet_b0_gn", SIZE)


def test_a_size_is_refused_as_such_whatever_the_weights(monkeypatch):
    monkeypatch.setitem(m.MODELS, "vgg11", lambda pretrained, **kwargs: timm.create_model("vgg11", **kwargs))  # as if it had them
    for weights in ("imagenet", "none"):
        with pytest.raises(InputError, match=r"cannot be built for 16 x 16 photos.*--resize"):
            create_model("vgg11", (16, 16), weights=weights)


def test_no_imagenet_weights_for_a_hand_written_backbone(monkeypatch):
    monkeypatch.setitem(m.MODELS, "tiny", lambda num_classes, **kwargs: nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes)))
    with pytest.raises(InputError, match="--weights none"):
        create_model("tiny", (4, 4), weights="imagenet")


@pytest.mark.parametrize("head", ["flat", "factored"])
def test_backbone_of_the_docstring(head, tmp_path, monkeypatch):
    namespace = {"nn": nn, "MODELS": m.MODELS}
    monkeypatch.setitem(m.MODELS, "tiny_cnn", None)  # goes with the test
    exec(docstring_backbone(), namespace)
    assert len([line for line in docstring_backbone().splitlines() if line.strip()]) <= 6
    model = create_model("tiny_cnn", SIZE, head).eval()
    folder = save(model, "tiny_cnn", tmp_path)
    photos = torch.randn(2, 3, *SIZE)
    assert torch.allclose(load_model(folder)[0](photos), model(photos), atol=1e-6)


def test_inference_state_leaves_the_model_alone():
    model = create_model("resnet18", SIZE, "factored")
    assert inference_state(model)["fc.weight"].shape == (18, 512)
    assert model.state_dict()["fc.weight"].shape == (8, 512)
