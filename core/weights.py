"""Loading the weights of a backbone from a file, without running code from it."""
import contextlib
import logging
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import timm
import torch
from torch import nn

from core.errors import InputError, as_one_line
from core.labels import NUM_CLASSES

log = logging.getLogger("mask")


def load_weights(model, path):
    """Load a backbone's weights from a file with timm's names; leave the classifier as it is.

    Raises:
        InputError: if the file is missing, is not a weights file, or does not fit; the tensors
            that do not match are named.
    """
    state = read_tensors(path)
    # timm converts older names, and position embeddings of another input size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    # The classifier has other classes. Some exports leave out the batch counters.
    ignored = tuple(f"{layer}." for layer in _classifier_layers(model))
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    expected, found = ({key: tuple(value.shape) for key, value in tensors.items()
                        if not key.startswith(ignored) and not key.endswith("_batches_tracked")}
                       for tensors in (model.state_dict(), state))
    wrong = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise InputError(f"--weights {path}: does not fit the model: {key} is "
                         f"{found.get(key, 'missing')}, expected {expected.get(key, 'no such key')}"
                         f" ({len(wrong)} mismatches); pass weights of this architecture")
    model.load_state_dict(state, strict=False)


def read_tensors(path):
    """Return the tensors of a .safetensors or .pth file by name.

    Raises:
        InputError: if the file is damaged, or holds anything but tensors.
    """
    try:
        state = timm.models.load_state_dict(str(path), use_ema=True, weights_only=True)
        # A .pth can also hold numbers, lists or a whole model.
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it holds something else")
        return state
    except Exception as error:  # damaged files make the readers raise exceptions of any class
        raise InputError(f"{path}: not a file of named tensors ({type(error).__name__}: "
                         f"{as_one_line(error)}); expected .safetensors, or a .pth with a "
                         f"state_dict") from None


def _classifier_layers(model):
    # timm names the classifier of its models.
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    # A hand-written backbone: its last linear layer with one output per class.
    layers = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module.out_features == NUM_CLASSES]
    return tuple(layers[-1:])


def is_reachable(url):
    """Return whether a server answers, with an error or not."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except Exception as error:  # a server that does not speak HTTP raises exceptions of any class
        return isinstance(error, urllib.error.HTTPError)
    return True


@contextlib.contextmanager
def hub_access(needed):
    """If the hub cannot be reached, do not ask it: its client would try for most of a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # hide its retry messages
    if needed:
        log.info("loading ImageNet weights, from the hub if they are not downloaded yet")
        if not is_reachable(huggingface_hub.constants.ENDPOINT):
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
        huggingface_hub.logging.set_verbosity(verbosity)


def find_damaged_download(model_name):
    """Return the hub's cache folder of a timm model if a weights file in it is damaged, or None."""
    cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = cfg and cfg.hf_hub_id and huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, name)
        if isinstance(path, str):
            try:
                read_tensors(path)
            except InputError:
                return Path(path).parents[2]
    return None
