"""The checkpoint folder: write it whole, read it without running its code, find the best, refuse the broken.

    results/checkpoint-500/model.safetensors       the weights inference uses (averaged if averaging is on)
                           config.json             timm's model-folder format, plus our keys under "mask_classification"
                           trainer_state.json      step, epoch, best so far, history of metrics, the flags
                           valid_predictions.csv   ImageID, person, label, ans and 18 probabilities of each validation photo
                           training_state.pt       what only resuming needs; kept for the last two checkpoints
                           SHA256SUMS              of the files above, as `sha256sum -c` reads it

For a timm architecture `timm.create_model("local-dir:results/checkpoint-500", pretrained=True)` gives the same model.
"""
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch

from errors import InputError, reason
from layout import CLASS_NAMES, NUM_CLASSES
from model import TTA, create_model, inference_state, input_statistics, model_args

OUR_KEY = "mask_classification"
TRAINING_STATE = ("model", "optimizer", "scaler", "ema", "losses")
CHECKSUMS = "SHA256SUMS"
CHECKED = ("model.safetensors", "config.json", "trainer_state.json", "training_state.pt")


def model_config(model, name, geometry, tta, amp, dataset):
    """The config.json of a model: timm's format, and what inference needs under "mask_classification".

    Args:
        model: as built by `create_model` for `name`.
        geometry: the `Geometry` it is trained with.
        tta: the views that its evaluation averages, "none" or "hflip".
        amp: mixed precision of its evaluation, as `autocast` takes it.
        dataset: JSON-able facts about the training data (class counts, where its eval part is).
    """
    mean, std = input_statistics(model)
    source = dict(getattr(model, "pretrained_cfg", {}))
    cfg = {key: source[key] for key in ("pool_size", "first_conv", "classifier", "fixed_input_size") if source.get(key)}
    cfg |= {"input_size": [3, *geometry.size], "num_classes": NUM_CLASSES, "mean": mean, "std": std, "crop_pct": 1.0,
            "crop_mode": "squash", "interpolation": "bilinear", "custom_load": False}
    config = {"architecture": source.get("architecture", name), "num_classes": NUM_CLASSES}
    if hasattr(model, "num_features"):
        config["num_features"] = model.num_features
    config |= {"label_names": CLASS_NAMES, "model_args": model_args(name, geometry.size), "pretrained_cfg": cfg}
    return config | {OUR_KEY: {"model": name, "size": geometry.size, "crop": geometry.crop, "tta": tta, "amp": amp,
                               "mean": mean, "std": std, "classes": CLASS_NAMES, **dataset}}


def save_checkpoint(output_dir, model, config, trainer_state, predictions, training_state):
    """Write checkpoint-<step> whole or not at all: temporary name, flush to disk, rename.

    Args:
        output_dir: the results folder.
        model: the one inference will use.
        config: from `model_config`.
        trainer_state: JSON-able, with "step"; no timings, so that equal runs have equal files.
        predictions: DataFrame for valid_predictions.csv, or None where nothing was evaluated.
        training_state: what only resuming needs; tensors, numbers and containers of them.

    Returns:
        Path of the new folder.
    """
    final = Path(output_dir) / f"checkpoint-{trainer_state['step']}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # save_file would make a file that only its owner can read.
        weights = safetensors.torch.save(inference_state(model), metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(weights)
        write_json(temporary / "config.json", config)
        write_json(temporary / "trainer_state.json", trainer_state)
        if predictions is not None:
            predictions.to_csv(temporary / "valid_predictions.csv", index=False, float_format="%.6f")
        _save_tensors(training_state, temporary / "training_state.pt")
        write_checksums(temporary)
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        temporary.rename(final)
        _flush(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def write_checksums(folder):
    """Write a checkpoint's SHA256SUMS anew, after its files were written or edited on purpose."""
    files = sorted(path for path in Path(folder).iterdir() if path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def list_checkpoints(output_dir):
    """The checkpoint-<step> folders of a results folder, by step."""
    if not Path(output_dir).is_dir():
        return []
    folders = [path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder):
    return int(Path(folder).name.partition("-")[2])


def find_checkpoint(model_dir):
    """The checkpoint that `--model_dir` means: itself, or the best of a results folder.

    Raises:
        InputError: if there is none; those that exist are named.
    """
    model_dir = Path(model_dir)
    if (model_dir / "config.json").is_file():
        return model_dir
    checkpoints = list_checkpoints(model_dir)
    if checkpoints:
        best = read_trainer_state(checkpoints[-1])["best_step"]
        return next((folder for folder in checkpoints if step_of(folder) == best), checkpoints[-1])
    beside = [str(folder) for folder in list_checkpoints(model_dir.parent) if folder != model_dir]
    found = "is not a checkpoint: it has no config.json" if model_dir.exists() else "no such checkpoint"
    raise InputError(f"--model_dir {model_dir}: {found}; " +
                     (f"those that exist: {', '.join(beside)}" if beside else "train one first: python train.py"))


def read_config(folder):
    """Our part of a checkpoint's config.json: model, size, crop, tta, amp, mean, std, classes, and the facts of the training data.

    Raises:
        InputError: for a half-written or damaged checkpoint, another format, or another number of classes.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    ours = config.get(OUR_KEY)
    if not isinstance(ours, dict):
        raise InputError(f"{folder / 'config.json'}: no {OUR_KEY!r} in it; expected a checkpoint written by train.py")
    if config.get("num_classes") != NUM_CLASSES:
        raise InputError(f"{folder / 'config.json'}: {config.get('num_classes')} classes; expected {NUM_CLASSES}")
    numbers = {"size": (2, 16, 4096), "crop": (2, 0.01, 1), "mean": (3, -10, 10), "std": (3, 1e-3, 10)}
    if not (isinstance(ours.get("model"), str) and all(_numbers(ours.get(key), *limits) for key, limits in numbers.items())
            and all(isinstance(side, int) for side in ours["size"]) and ours.get("tta") in TTA
            and isinstance(ours.get("amp"), bool | None) and isinstance(ours.get("eval_dir"), str | None)
            and _are_counts(ours.get("class_counts"))):
        raise InputError(f"{folder / 'config.json'}: damaged; expected model, size, crop, mean, std, tta, amp and facts of the "
                         f"dataset under {OUR_KEY!r}")
    return ours


def load_model(folder):
    """(model in evaluation mode on the CPU, its `read_config`) of a checkpoint.

    Raises:
        InputError: as `read_config`, and for weights that are damaged or do not fit.
    """
    folder = Path(folder)
    ours = read_config(folder)
    if (folder / CHECKSUMS).is_file():  # a copy for inference may lack it, as may an edited config.json its sum
        verify(folder, ["model.safetensors"])
    state = read_weights(folder / "model.safetensors")
    model = create_model(ours["model"], ours["size"], weights="none")
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise InputError(f"{folder / 'model.safetensors'}: does not fit {ours['model']} ({wrong[0]}, {len(wrong)} such); "
                         f"expected the weights of config.json's architecture")
    model.load_state_dict(state)
    return model.eval(), ours


def verify(folder, names=()):
    """Compare a checkpoint's files with its SHA256SUMS: those of `names`, or all, training_state.pt among them.

    Raises:
        InputError: if one is missing, or is not what was written.
    """
    try:
        text = (folder / CHECKSUMS).read_text(errors="replace")
        sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.M)}
        for name in names or [*CHECKED, *({"valid_predictions.csv"} & sums.keys())]:
            if not (folder / name).is_file():
                raise FileNotFoundError(errno.ENOENT, "no such file", folder / name)
            if sha256(folder / name) != sums.get(name):
                raise InputError(f"{folder / name}: damaged, not what was written by its {CHECKSUMS}; use another checkpoint")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing, so the checkpoint is half-written; use another checkpoint") from None


def read_weights(path):
    """The tensors of a .safetensors file; InputError if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so the checkpoint is half-written; use another checkpoint") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file, or damaged ({error}); use another checkpoint") from None


def read_trainer_state(folder):
    """trainer_state.json of a checkpoint; InputError if it is missing or damaged."""
    path = Path(folder) / "trainer_state.json"
    state = read_json(path)
    kinds = {"step": int, "epoch": float | int, "best_step": int | None, "best_macro_f1": float | None, "history": list,
             "args": dict}
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            raise InputError(f"{path}: damaged; its {key} is none; use another checkpoint")
    if not all(isinstance(metrics, dict) and isinstance(metrics.get("step"), int) for metrics in state["history"]):
        raise InputError(f"{path}: damaged; expected a step in each entry of its history; use another checkpoint")
    return state


def read_training_state(folder):
    """What only resuming needs, loaded without running code; InputError if it is damaged."""
    path = Path(folder) / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in TRAINING_STATE}
    except Exception as error:  # whatever a damaged or hostile file makes torch's reader raise
        raise InputError(f"{path}: holds something else than tensors, or is damaged ({reason(error)}); "
                         f"use another checkpoint") from None


def read_json(path):
    """A JSON object; InputError if the file is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so the checkpoint is half-written; use another checkpoint") from None
    except (ValueError, RecursionError) as error:  # also of text that is no text, and of a number with 5,000 digits
        raise InputError(f"{path}: damaged, not JSON ({reason(error)}); use another checkpoint") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged; expected a JSON object; use another checkpoint")
    return value


def _numbers(value, length, low, high):
    return isinstance(value, list) and len(value) == length and all(isinstance(x, (int, float)) and low <= x <= high for x in value)


def _are_counts(value):
    """Whether they are the training photos of each class, or nothing is told of them."""
    return value is None or (_numbers(value, NUM_CLASSES, 0, 1e12) and sum(value) > 0)


def sha256(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_tensors(value, path):
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch reports a failed write as a wrong position, and the system's reason only as its context.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
