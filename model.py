"""Backbones.

To add one, write a function that returns any `nn.Module` from normalized photos (B, 3, H, W) to
(B, num_classes) logits, and add it to MODELS. `--model tiny_cnn --weights none` then trains it,
and inference finds it by that name:

    def tiny_cnn(num_classes):
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))

    MODELS["tiny_cnn"] = tiny_cnn

Every timm model works by its name, without an entry here.
"""
import difflib
import inspect
import shlex
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from core.checkpoint import model_args, read_config, read_weights
from core.errors import InputError, as_one_line
from core.labels import NUM_CLASSES
from core.weights import find_damaged_download, hub_access, load_weights

# Name -> function. It gets those arguments that it takes of num_classes, drop_rate, pretrained and,
# if the name is that of a timm model of a fixed input size, img_size. recipes/ uses these names.
MODELS = {
    "efficientnet_b4": partial(timm.create_model, "efficientnet_b4"),
    "resnet": partial(timm.create_model, "resnet50"),
    "resnet18": partial(timm.create_model, "resnet18"),
    "vgg11": partial(timm.create_model, "vgg11"),
    "vgg19": partial(timm.create_model, "vgg19"),
}


def create_model(name, size, weights="none", dropout=0.0):
    """Build a classifier from normalized photos (B, 3, *size) to (B, 18) logits.

    Args:
        name: a key of MODELS, or any timm model name.
        size: (height, width) of the input; a Swin or ViT is built for it.
        weights: "imagenet" (downloaded by timm), "none", or a .safetensors/.pth file of this
            architecture, whose classifier is ignored.
        dropout: dropout rate before the classifier, if the architecture has one.

    Returns:
        The model in training mode, on the CPU.

    Raises:
        InputError: for an unknown name, weights that are not available or do not fit, or a size
            that the model cannot take.
    """
    build, is_imagenet = find_builder(name), weights == "imagenet"
    kwargs = {"num_classes": NUM_CLASSES, "drop_rate": dropout, "pretrained": is_imagenet}
    kwargs |= model_args(name, size)
    # A function gets those of these arguments that it takes.
    parameters = inspect.signature(build).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        kwargs = {key: kwargs[key] for key in kwargs.keys() & parameters.keys()}
    is_timm_name = getattr(build, "func", None) is timm.create_model
    # For messages: "resnet" is timm's resnet50.
    timm_name = build.args[0] if is_timm_name else name
    try:
        with hub_access(is_imagenet):
            model = build(**kwargs)
    except Exception as error:  # timm and the hub's client raise exceptions of any class
        if is_imagenet and _can_build(build, kwargs | {"pretrained": False}):
            raise _weights_error(timm_name, error) from None
        if not is_timm_name:
            raise  # a bug in a hand-written function
        raise _size_error(timm_name, size, error) from None
    if hasattr(model, "pretrained_cfg"):
        _try_size(model, timm_name, size)
    elif is_imagenet and "pretrained" not in parameters:
        raise InputError(f"--weights imagenet: {name} is hand-written and has no ImageNet "
                         f"weights; pass --weights none or --weights FILE")
    if weights == "none":
        zero_init_residuals(model)
    elif not is_imagenet:
        load_weights(model, weights)
    return model


def _can_build(build, kwargs):
    try:
        build(**kwargs)
    except Exception:
        return False
    return True


def _try_size(model, name, size):
    """Try the size on a timm model; errors in the forward of a hand-written one are bugs."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    except Exception as error:
        raise _size_error(name, size, error) from None
    model.train()


def _weights_error(name, error):
    remedy = (f"pass --weights none to train from scratch, or --weights FILE with a .safetensors "
              f"or .pth of {name}")
    damaged = find_damaged_download(name)
    if damaged:
        return InputError(f"--weights imagenet: the downloaded weights of {name} are damaged; "
                          f"delete them with: rm -r {shlex.quote(str(damaged))} (or {remedy})")
    return InputError(f"--weights imagenet: the weights of {name} are not available "
                      f"({as_one_line(error)}); {remedy}")


def _size_error(name, size, error):
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    native = f", such as {cfg.input_size[1]} {cfg.input_size[2]}" if cfg else ""
    return InputError(f"--model {name}: cannot be built for {size[0]} x {size[1]} photos "
                      f"({as_one_line(error)}); try another --resize{native}")


def find_builder(name):
    """Return the function that builds a backbone; InputError if there is none of that name."""
    if name in MODELS:
        return MODELS[name]
    # Not a timm name: suggest similar ones. Names with ":" or "/" would be looked up on the hub.
    if not timm.is_model(name.partition(".")[0]) or ":" in name or "/" in name:
        known = sorted(MODELS)
        near = difflib.get_close_matches(name, known + timm.list_models(), n=3, cutoff=0.5)
        suggestion = f", such as {', '.join(near)}" if near else ""
        raise InputError(f"--model {name}: unknown; model.py lists {', '.join(known)}; any timm "
                         f"name works{suggestion}")
    # A name with a tag, such as resnet18.a1_in1k: the tag must exist.
    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if "." in name and name not in tags:
        raise InputError(f"--model {name}: timm has no weights with this tag; expected "
                         f"{', '.join(tags[:8]) or 'no tag'}")
    return partial(timm.create_model, name)


def zero_init_residuals(model):
    """Start every residual block of an EfficientNet as the identity (last batch norm scale 0).

    A deep network then trains from scratch as fast as a shallow one (Goyal et al. 2017, section
    5.1). timm does this for ResNets. The blocks of its EfficientNets have `has_skip`.
    """
    for block in model.modules():
        if getattr(block, "has_skip", False):
            norms = [layer for layer in block.children() if isinstance(layer, nn.BatchNorm2d)]
            for norm in norms[-1:]:
                nn.init.zeros_(norm.weight)


def load_model(folder):
    """Rebuild the model of a checkpoint: (model in evaluation mode on the CPU, its config).

    Raises:
        InputError: as `read_config`, and for weights that are damaged or do not fit.
    """
    config = read_config(folder)
    state = read_weights(folder)
    model = create_model(config["model"], config["size"])
    # Same tensors with the same shapes, or the weights belong to another architecture.
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong = wrong or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise InputError(f"{Path(folder) / 'model.safetensors'}: does not fit {config['model']} "
                         f"({wrong[0]} and {len(wrong) - 1} other tensors); expected the weights "
                         f"of the architecture in config.json")
    model.load_state_dict(state)
    return model.eval(), config
