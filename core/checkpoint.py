"""The checkpoint folder: write it whole, read it without running code, find the best.

    results/checkpoint-500/model.safetensors      the weights for inference (averaged if EMA is on)
                           config.json            timm's model-folder format; our keys are under
                                                  "mask_classification"
                           trainer_state.json     step, epoch, best so far, metrics, flags
                           valid_predictions.csv  ImageID, person, label, ans, 18 probabilities
                           training_state.pt      only for --resume; kept for the last two

For a timm architecture `timm.create_model("local-dir:results/checkpoint-500", pretrained=True)`
gives the same model.
"""
import contextlib
import errno
import json
import re
import shlex
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import timm
import torch

from core import distributed
from core.cli import script
from core.errors import InputError, as_one_line
from core.files import write_atomically, write_json
from core.labels import CLASS_NAMES, NUM_CLASSES

OUR_KEY = "mask_classification"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class TrainerState:
    """What a run knows about itself; the content of trainer_state.json.

    It holds no timings, so that two equal runs have equal files.
    """
    step: int = 0  # optimizer steps done
    epoch: float = 0.0  # passes over the training photos done
    best_step: int | None = None
    best_macro_f1: float | None = None
    history: list = field(default_factory=list)  # the metrics of every evaluation
    data: str = ""  # fingerprint of the photos
    args: dict = field(default_factory=dict)  # those of `run_folder.recorded_flags`


# --- config.json ---

def input_statistics(model):
    """Return (mean, std) of RGB in [0, 1] for the model's inputs; ImageNet's if it has none."""
    cfg = getattr(model, "pretrained_cfg", {})
    return tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))


def model_args(name, size):
    """Return the constructor arguments for the input size: img_size for a Swin, a ViT, ..."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": tuple(size)} if cfg is not None and cfg.fixed_input_size else {}


def model_config(model, name, crop_resize, tta, amp, dataset):
    """Return the config.json of a model: timm's format, and our keys for inference.

    Args:
        model: from `model.create_model`.
        name: the --model name.
        crop_resize: the `CropResize` it is trained with.
        tta: "none" or "hflip", as in its evaluation.
        amp: mixed precision of its evaluation, as `autocast` takes it.
        dataset: facts about the training data: kind, class counts, where its eval part is.
    """
    # timm's part: how timm.create_model("local-dir:...") builds the model.
    mean, std = input_statistics(model)
    size = crop_resize.size
    source = dict(getattr(model, "pretrained_cfg", {}))
    kept = ("pool_size", "first_conv", "classifier", "fixed_input_size")
    cfg = {key: source[key] for key in kept if source.get(key)}
    cfg |= {"input_size": [3, *size], "num_classes": NUM_CLASSES, "mean": mean, "std": std,
            "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear",
            "custom_load": False}
    # Our part: all that inference.py needs.
    ours = {"model": name, "size": size, "crop": crop_resize.crop, "tta": tta, "amp": amp,
            "mean": mean, "std": std, "classes": CLASS_NAMES, **dataset}
    return {"architecture": source.get("architecture", name), "num_classes": NUM_CLASSES,
            "label_names": CLASS_NAMES, "model_args": model_args(name, size),
            "pretrained_cfg": cfg, OUR_KEY: ours}


def sample_note(configs):
    """Return a sentence if one of the models was trained on the built-in sample, else ""."""
    if any(config.get("data_kind") == "sample" for config in configs):
        return ("This model was trained on the built-in sample of drawn people: on real photos its "
                "predictions mean nothing.")
    return ""


def read_config(folder):
    """Return our part of config.json: model, size, crop, tta, amp, mean, std, dataset facts.

    Raises:
        InputError: for a missing or damaged file, another format, or another number of classes.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    ours = config.get(OUR_KEY)
    if not isinstance(ours, dict) or {"model", "size", "crop", "tta", "mean", "std"} - ours.keys():
        raise InputError(f"{path}: no model, size, crop, tta, mean and std under {OUR_KEY!r}; "
                         f"expected a checkpoint written by train.py")
    if config.get("num_classes") != NUM_CLASSES:
        raise InputError(f"{path}: {config.get('num_classes')} classes; expected {NUM_CLASSES}")
    return ours


# --- writing and reading a checkpoint ---
# Every reader raises InputError for a missing or damaged file.

def save_checkpoint(output_dir, model, config, state, predictions, training_state):
    """Write checkpoint-<step> whole or not at all, in process 0.

    Args:
        output_dir: the results folder.
        model: the model for inference.
        config: from `model_config`.
        state: the `TrainerState`.
        predictions: DataFrame for valid_predictions.csv, or None if nothing was evaluated.
        training_state: what only --resume needs: tensors, numbers and containers of them.

    Returns:
        Path of the new folder; None in the other processes.
    """
    if distributed.rank():
        return None
    folder = Path(output_dir) / f"checkpoint-{state.step}"
    # safetensors stores contiguous tensors only; the model may be in channels_last.
    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with write_atomically(folder) as temporary:
        temporary.mkdir()
        # safetensors' own save_file makes a file that only its owner can read.
        weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(weights)
        write_json(temporary / "config.json", config)
        write_json(temporary / "trainer_state.json", asdict(state))
        if predictions is not None:
            predictions.to_csv(temporary / "valid_predictions.csv", index=False,
                               float_format="%.6g")
        _save_tensors(training_state, temporary / "training_state.pt")
    return folder


def read_weights(folder):
    """Return the tensors of model.safetensors."""
    with _reading(Path(folder) / "model.safetensors") as path:
        return safetensors.torch.load_file(path)


def read_trainer_state(folder):
    """Return the `TrainerState` of a checkpoint."""
    path = Path(folder) / "trainer_state.json"
    values = read_json(path)
    with _reading(path):
        return TrainerState(**values)


def read_training_state(folder):
    """Return what only --resume needs: tensors, numbers and containers of them, no code."""
    with _reading(Path(folder) / "training_state.pt") as path:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if archive.testzip():
                raise ValueError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_json(path):
    """Return a JSON object."""
    with _reading(path):
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


@contextlib.contextmanager
def _reading(path):
    """Turn the errors of a reader into an InputError that names the file."""
    try:
        yield path
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so the checkpoint is incomplete; use another "
                         f"checkpoint") from None
    except Exception as error:  # damaged files make the readers raise exceptions of any class
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the system's error; the file itself may be intact
        raise InputError(f"{path}: damaged, or not what train.py writes ({type(error).__name__}: "
                         f"{as_one_line(error)}); use another checkpoint") from None


def _save_tensors(value, path):
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch hides the system's error (a full disk) as the context of its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


# --- finding checkpoints ---

def list_checkpoints(output_dir):
    """Return the checkpoint-<step> folders of a results folder, sorted by step."""
    if not Path(output_dir).is_dir():
        return []
    folders = [path for path in Path(output_dir).iterdir()
               if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def is_checkpoint(folder):
    """Return whether a folder is a checkpoint of train.py, and not of another program."""
    if any((folder / name).exists() for name in ("training_state.pt", "valid_predictions.csv")):
        return True
    try:
        read_config(folder)
    except InputError:
        return False
    return True


def step_of(folder):
    return int(Path(folder).name.partition("-")[2])


def find_checkpoint(model_dir):
    """Return the checkpoint that --model_dir names: itself, or the best of a results folder.

    Raises:
        InputError: if there is none; the existing ones are named.
    """
    model_dir = Path(model_dir)
    if (model_dir / "config.json").is_file():
        return model_dir
    # A results folder: the last checkpoint knows which one is the best.
    checkpoints = list_checkpoints(model_dir)
    if checkpoints:
        best = read_trainer_state(checkpoints[-1]).best_step
        return next((folder for folder in checkpoints if step_of(folder) == best), checkpoints[-1])
    # Neither: name the folds in it, or the checkpoints beside it.
    folds = sorted(model_dir.glob("fold-*"))
    if folds:
        raise InputError(f"--model_dir {model_dir}: holds {len(folds)} folds; to average them pass "
                         f"--model_dir {shlex.join(map(str, folds))}")
    if model_dir.is_file():
        raise InputError(f"--model_dir {model_dir}: is a file; pass its folder {model_dir.parent}")
    found = "no config.json in it" if model_dir.exists() else "no such checkpoint"
    siblings = [str(folder) for folder in list_checkpoints(model_dir.parent)
                if folder != model_dir]
    remedy = (f"existing checkpoints: {', '.join(siblings)}" if siblings
              else f"train a model first: {script('train.py')}")
    raise InputError(f"--model_dir {model_dir}: {found}; {remedy}")
