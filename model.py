"""Backbones and heads.

To add a backbone, write a function that returns any `nn.Module` from normalized photos (B, 3, H, W) to (B, num_classes)
logits, and name it in MODELS; `--model tiny_cnn --weights none` then trains it, and inference finds it by that name:

    def tiny_cnn(num_classes, **kwargs):
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))

    MODELS["tiny_cnn"] = tiny_cnn

The default head, `--head factored`, takes the place of its last linear layer. Any timm name works without being listed.
"""
import difflib
import sys
import urllib.error
import urllib.request
from functools import partial

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from torch import nn

from errors import InputError, reason
from layout import AGES, GENDERS, MASKS, NUM_CLASSES, decode

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Each is called with num_classes, drop_rate, pretrained and, for a timm model of a fixed input size, img_size.
MODELS = {
    "efficientnet_b4": partial(timm.create_model, "efficientnet_b4"),
    "resnet": partial(timm.create_model, "resnet50"),
    "resnet18": partial(timm.create_model, "resnet18"),
    "vgg11": partial(timm.create_model, "vgg11"),
    "vgg19": partial(timm.create_model, "vgg19"),
}
HEADS = ("flat", "factored")
TTA = ("none", "hflip")  # of which views of a photo the mean is predicted


def create_model(name, size, head="flat", weights="none", dropout=0.0):
    """Build a classifier of normalized photos (B, 3, *size) into (B, 18) logits.

    Args:
        name: a key of MODELS, or any timm model name.
        size: (height, width) of the input; a Swin or ViT is built for it.
        head: "flat" for 18 logits straight, "factored" for mask + gender + age logits summed into 18 (`FactoredHead`).
        weights: "imagenet" (fetched by timm), "none", or a .safetensors/.pth file of this architecture, loaded without
            running code; its head is ignored.
        dropout: rate before the head, where the architecture has one.

    Returns:
        The model in training mode, on the CPU.

    Raises:
        InputError: for an unknown name, weights that cannot be had or do not fit, a size the model cannot take, or a factored
            head where the model does not end in one linear layer.
    """
    build = find_builder(name)
    if weights == "imagenet":
        # Weights that are cached load at once, and those that are not fail at once instead of after a minute of retries.
        huggingface_hub.constants.HF_HUB_OFFLINE |= not _is_reachable(huggingface_hub.constants.ENDPOINT)
    kwargs = {"num_classes": NUM_CLASSES, "drop_rate": dropout, "pretrained": weights == "imagenet"} | model_args(name, size)
    # timm's and the hub's errors differ by release; what the user can do about them does not.
    errors = (OSError, RuntimeError, ValueError, AssertionError)
    too_odd = f"--model {name}: cannot be built for {size[0]} x {size[1]} photos ({{}}); try another --resize"
    try:
        model = build(**kwargs)
    except errors as error:
        if weights == "imagenet":
            raise InputError(f"--weights imagenet: the weights of {name} cannot be had ({reason(error)}); pass --weights none to "
                             f"train from scratch, or --weights FILE with a .safetensors or .pth of {name}") from None
        raise InputError(too_odd.format(reason(error))) from None
    if hasattr(model, "pretrained_cfg"):  # a bug in a hand-written backbone keeps its traceback
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, *size))
        except errors as error:
            raise InputError(too_odd.format(reason(error))) from None
        model.train()
    if weights == "imagenet" and not hasattr(model, "pretrained_cfg"):
        raise InputError(f"--weights imagenet: {name} is hand-written and has none; pass --weights none or --weights FILE")
    if weights == "none":
        zero_residuals(model)
    elif weights != "imagenet":
        load_weights(model, weights)
    if head == "factored":
        layer = head_name(model)
        model.set_submodule(layer, FactoredHead(model.get_submodule(layer).in_features))
    return model


def find_builder(name):
    """The function that builds a backbone; InputError if there is none of that name."""
    return MODELS.get(name) or _timm_builder(name)


def zero_residuals(model):
    """Start every residual block of an EfficientNet as the identity: the scale of its last batch norm is 0.

    A deep network then learns from scratch as fast as a shallow one (Goyal et al. 2017, section 5.1). timm does it for
    ResNets by itself; blocks of its EfficientNet family are known by their `has_skip`.
    """
    for block in model.modules():
        if getattr(block, "has_skip", False):
            norms = [layer for layer in block.children() if isinstance(layer, nn.BatchNorm2d)]
            for norm in norms[-1:]:
                nn.init.zeros_(norm.weight)


def load_weights(model, path):
    """Load a backbone's weights from a file in timm's naming, leaving the head as it is.

    Raises:
        InputError: if the file is missing, is no weights file, or does not fit; the mismatched tensors are named.
    """
    state = read_tensors(path)
    # timm's own conversion of older namings and of position embeddings to another input size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    own = model.state_dict()
    head = tuple(f"{layer}." for layer in _classifiers(model))
    wanted = {key for key in own if not key.startswith(head)}
    found = {key for key in state if not key.startswith(head)}
    problems = [f"{key} is missing" for key in sorted(wanted - found)]
    problems += [f"{key} is not in the model" for key in sorted(found - wanted)]
    problems += [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
                 for key in sorted(found & wanted) if state[key].shape != own[key].shape]
    # Bookkeeping that some exports leave out and that no forward pass in evaluation reads.
    problems = [problem for problem in problems if not problem.endswith("num_batches_tracked is missing")]
    if problems:
        raise InputError(f"--weights {path}: does not fit the model ({len(problems)} mismatches: {'; '.join(problems[:3])}); "
                         f"pass weights of this architecture")
    model.load_state_dict({key: state[key] for key in found}, strict=False)


def read_tensors(path):
    """The tensors of a .safetensors or .pth file by name, read without running any code that the file may hold.

    Raises:
        InputError: if the file is damaged, or holds anything but tensors.
    """
    try:
        state = timm.models.load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise InputError(f"{path}: not a file of tensors ({type(error).__name__}: {reason(error)}); expected .safetensors, or a "
                         f".pth saved from a state_dict") from None
    tensors = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    if not tensors or not state:
        raise InputError(f"{path}: holds something else than tensors by name; expected a state_dict")
    return state


class FactoredHead(nn.Linear):
    """Mask (3), gender (2) and age (3) logits of a feature vector, summed into the 18 class logits.

    logit(mask, gender, age) = mask logit + gender logit + age logit: under softmax the three attributes are predicted
    independently. It is exactly one 18-way linear layer with tied weights, and is saved as that layer.
    """

    def __init__(self, in_features):
        super().__init__(in_features, len(MASKS) + len(GENDERS) + len(AGES))
        mask, gender, age = decode(torch.arange(NUM_CLASSES))
        rows = [F.one_hot(mask, len(MASKS)), F.one_hot(gender, len(GENDERS)), F.one_hot(age, len(AGES))]
        self.register_buffer("membership", torch.cat(rows, dim=1).float(), persistent=False)  # (18, 8) of 0 and 1

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # as it is saved
            weight, bias = self.folded()
        return F.linear(features, weight, bias)

    def folded(self):
        """Weight (18, in_features) and bias (18,) of the equivalent linear layer."""
        return self.membership @ self.weight, self.membership @ self.bias


def inference_state(model):
    """The state_dict that inference needs: the head as one 18-way linear layer, whatever it was in training."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, FactoredHead):
            state[f"{name}.weight"], state[f"{name}.bias"] = module.folded()
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def head_name(model):
    """Name of the one linear layer that gives the 18 logits.

    Raises:
        InputError: if there is no such layer, or several, so that another head cannot take its place.
    """
    layers = _classifiers(model)
    if len(layers) != 1 or not isinstance(model.get_submodule(layers[0]), nn.Linear):
        raise InputError("--head factored needs a model that ends in one linear layer; pass --head flat")
    return layers[0]


def model_args(name, size):
    """The constructor arguments that the input size asks for: img_size for a Swin, a ViT and their like."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": tuple(size)} if cfg is not None and cfg.fixed_input_size else {}


def input_statistics(model):
    """(mean, std) of RGB in [0, 1] that the backbone's weights were trained with; ImageNet's for a hand-written one."""
    cfg = getattr(model, "pretrained_cfg", {})
    return tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))


def _classifiers(model):
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    # A hand-written backbone: its last linear layer with as many outputs as there are classes.
    layers = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module.out_features == NUM_CLASSES]
    return tuple(layers[-1:])


def _timm_builder(name):
    if not timm.is_model(name.partition(".")[0]) or ":" in name or "/" in name:
        known = sorted(MODELS)
        near = difflib.get_close_matches(name, known + timm.list_models(), n=3, cutoff=0.5)
        raise InputError(f"--model {name}: unknown; model.py lists {', '.join(known)}; any timm name works"
                         f"{', such as ' + ', '.join(near) if near else ''}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise InputError(f"--model {name}: no such weights of it; expected {', '.join(tags[:8]) or 'no tag'}") from None
    return lambda **kwargs: timm.create_model(name, **kwargs)


def _is_reachable(url):
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True
