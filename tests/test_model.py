"""Backbones: checkpoints that rebuild them, weights from files, and what cannot be built."""
import pytest
import timm
import torch
from conftest import docstring_backbone
from safetensors.torch import save_file
from torch import nn

from core.checkpoint import TrainerState, model_config, save_checkpoint
from core.errors import InputError
from dataset import CropResize
from model import MODELS, create_model, load_model

SIZE = (64, 48)


def save(model, name, folder):
    """Write a checkpoint of a model; return its folder."""
    config = model_config(model, name, CropResize(SIZE), "none", None, {})
    return save_checkpoint(folder, model, config, TrainerState(step=1), None, {})


@pytest.mark.parametrize("name", [
    "efficientnet_b4", "resnet18", "resnet", "vgg11", "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224", "convnext_atto", "levit_128", "volo_d1_224"])
def test_checkpoint_is_a_timm_folder_and_rebuilds_its_model(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, SIZE)
    with torch.no_grad():  # layers that start at zero would make any two models agree
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    photos = torch.randn(2, 3, *SIZE)
    assert model(photos).shape == (2, 18)  # some architectures have another output in training
    model.eval()
    folder = save(model, name, tmp_path)
    ours, config = load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        logits = model(photos)
        assert logits.shape == (2, 18) and logits.std() > 0
        assert torch.allclose(ours(photos), logits, atol=1e-5)
        assert torch.allclose(theirs(photos), logits, atol=1e-5)
    assert tuple(config["size"]) == SIZE


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_file_sets_the_backbone_and_leaves_the_classifier(suffix, tmp_path):
    source = timm.create_model("resnet18", num_classes=1000)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    model = create_model("resnet18", SIZE, str(path))
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.layer4[1].bn2.bias, source.layer4[1].bn2.bias)
    assert model.fc.weight.shape == (18, 512)


def test_weights_file_with_18_classes_leaves_the_classifier_too(tmp_path):
    source = timm.create_model("resnet18", num_classes=18)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_model("resnet18", SIZE, str(tmp_path / "w.safetensors"))
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert not torch.equal(model.fc.weight, source.fc.weight)


def test_weights_of_a_vit_fit_another_size(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_model("vit_tiny_patch16_224", SIZE, str(tmp_path / "w.safetensors"))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert model.pos_embed.shape[1] == 1 + 4 * 3


def test_mismatched_weights_are_named(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: .*layer1\.0\.conv1\.weight is missing"):
        create_model("resnet18", SIZE, str(tmp_path / "a.safetensors"))
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: .*layer1\.2\..* expected no such key"):
        create_model("resnet18", SIZE, str(tmp_path / "b.safetensors"))


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


def test_weights_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="not a file of named tensors"):
        create_model("resnet18", SIZE, "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_unknown_model_names_the_known_and_the_nearest_ones():
    with pytest.raises(InputError, match=r"efficientnet_b4.*resnet18.*such as.*efficientnet_b5"):
        create_model("eficientnet_b5", SIZE)


def test_resnet_has_50_layers():
    resnet50 = timm.create_model("resnet50", num_classes=18)
    own, expected = (sum(p.numel() for p in model.parameters())
                     for model in (create_model("resnet", SIZE), resnet50))
    assert own == expected


def test_an_efficientnet_without_batch_norm_can_be_built():
    create_model("efficientnet_b0_gn", SIZE)


def test_a_size_that_does_not_fit_is_named_whatever_the_weights(monkeypatch):
    # As if the ImageNet weights were downloaded.
    monkeypatch.setitem(MODELS, "vgg11",
                        lambda pretrained, **kwargs: timm.create_model("vgg11", **kwargs))
    for weights in ("imagenet", "none"):
        with pytest.raises(InputError, match=r"cannot be built for 16 x 16 photos.*--resize"):
            create_model("vgg11", (16, 16), weights)


def test_no_imagenet_weights_for_a_hand_written_backbone(monkeypatch):
    def tiny(num_classes, **kwargs):
        return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))

    monkeypatch.setitem(MODELS, "tiny", tiny)
    with pytest.raises(InputError, match=r"tiny is hand-written.*--weights none"):
        create_model("tiny", (4, 4), "imagenet")


def test_a_hand_written_backbone_may_load_weights_itself(monkeypatch):
    def tiny(num_classes, pretrained=False):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))
        nn.init.constant_(model[1].weight, 1.0 if pretrained else 0.0)
        return model

    monkeypatch.setitem(MODELS, "tiny", tiny)
    assert (create_model("tiny", (4, 4), "imagenet")[1].weight == 1).all()
    assert (create_model("tiny", (4, 4), "none")[1].weight == 0).all()


def test_the_backbone_in_the_docstring_works_and_its_checkpoint_rebuilds_it(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny_cnn", None)  # is removed after the test
    exec(docstring_backbone(), {"nn": nn, "MODELS": MODELS})
    assert len([line for line in docstring_backbone().splitlines() if line.strip()]) <= 6
    model = create_model("tiny_cnn", SIZE).eval()
    folder = save(model, "tiny_cnn", tmp_path)
    photos = torch.randn(2, 3, *SIZE)
    assert model(photos).shape == (2, 18)
    assert torch.allclose(load_model(folder)[0](photos), model(photos), atol=1e-6)
