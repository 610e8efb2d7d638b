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
import logging
import os
import re
import shlex
import shutil
from pathlib import Path

import safetensors.torch
import torch

try:
    import fcntl
except ImportError:  # Windows, where a folder is not locked
    fcntl = None

from errors import InputError, reason
from layout import CLASS_NAMES, NUM_CLASSES
from model import TTA, create_model, inference_state, input_statistics, model_args

log = logging.getLogger("mask")

OUR_KEY = "mask_classification"
KEPT_TRAINING_STATES = 2
TRAINING_STATE = ("model", "optimizer", "scaler", "ema", "losses")
CHECKSUMS = "SHA256SUMS"
CHECKED = ("model.safetensors", "config.json", "trainer_state.json", "training_state.pt")


def model_config(model, name, geometry, tta, dataset):
    """The config.json of a model: timm's format, and what inference needs under "mask_classification".

    Args:
        model: as built by `create_model` for `name`.
        geometry: the `Geometry` it is trained with.
        tta: the views that its evaluation averages, "none" or "hflip".
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
    return config | {OUR_KEY: {"model": name, "size": geometry.size, "crop": geometry.crop, "tta": tta, "mean": mean,
                               "std": std, "classes": CLASS_NAMES, **dataset}}


def check_output_dir(output_dir, resumes, overwrites, argv):
    """InputError if the results folder cannot be made, or holds a run and no flag says what to do with it."""
    path = next(path for path in [output_dir.absolute(), *output_dir.absolute().parents] if path.exists())
    if not path.is_dir():
        raise InputError(f"--output_dir {output_dir}: {path} is a file; expected a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {output_dir}: no permission to write in {path}; choose another --output_dir")
    if list_checkpoints(output_dir) and not resumes and not overwrites:
        other = next(f"{output_dir}-{n}" for n in range(2, 1000) if not Path(f"{output_dir}-{n}").exists())
        command = shlex.join(["python", "train.py", *argv, "--output_dir", other])
        raise InputError(f"--output_dir {output_dir}: already holds a run; pass --resume to go on with it, --overwrite to "
                         f"delete it, or run: {command}")


def lock_output_dir(output_dir):
    """Make the results folder this process's own until it ends, however it ends; the open file must be kept.

    What a killed run had only begun to write or to remove is removed. What is written into the file is read by `was_begun_by`.

    Raises:
        InputError: if another run is in it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    handle = open(output_dir / ".lock", "a")  # noqa: SIM115
    try:
        if fcntl:
            # Not flock, whose lock a killed run's loader processes, which live on for seconds, would still hold.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning(f"warning: {output_dir} cannot be locked ({error.strerror}); let no other run write in it")
        else:
            handle.close()
            raise InputError(f"--output_dir {output_dir}: another run is writing in it; wait for it, or pass another "
                             f"--output_dir") from None
    for folder in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(folder)
    handle.truncate(0)
    return handle


def was_begun_by(output_dir, launch):
    """Whether the run in a results folder is of this start of torchrun, which has started its processes again."""
    lock = output_dir / ".lock"
    return bool(launch) and lock.is_file() and lock.read_text() == launch


def delete_run(output_dir):
    """Remove what a run wrote into its results folder, and nothing else."""
    for folder in [*list_checkpoints(output_dir), *output_dir.glob("damaged-checkpoint-*"), output_dir / "tensorboard"]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("log.jsonl", "valid_predictions.csv", "augmented_inputs.png", "confusion_matrix.png", "worst_mistakes.png",
                 "bad_batch.txt"):
        (output_dir / name).unlink(missing_ok=True)


def resume(output_dir, state):
    """Fill `state` from the last whole checkpoint and return its training state, or None if there is no checkpoint yet.

    Raises:
        InputError: if a flag differs that would change what was already computed, or no checkpoint is whole.
    """
    if not list_checkpoints(output_dir):
        log.info(f"nothing to resume in {output_dir} yet: starting from step 0")
        return None
    folder, before, training_state = last_whole_checkpoint(output_dir)
    epochs, asked = before["args"].get("epochs"), state["args"]["epochs"]
    for key, value in state["args"].items():
        if before["args"].get(key) != value and not (key == "epochs" and isinstance(epochs, int) and asked > epochs):
            raise InputError(f"--resume: this run had {as_flag(key, before['args'].get(key))}, and {as_flag(key, value)} would "
                             f"change what was already computed; pass the former, or another --output_dir")
    if before.get("data") != state["data"]:
        raise InputError("--resume: the dataset's people, photos or labels have changed since, and the split with them; pass the "
                         "--data_dir this run began with, or another --output_dir")
    if epochs != asked:
        log.info(f"--epochs was {epochs} and is now {asked}: the schedule changes from here")
    state |= {key: before[key] for key in ("step", "epoch", "best_step", "best_macro_f1", "history")}
    log.info(f"resuming from {folder}")
    return training_state


def last_whole_checkpoint(output_dir):
    """(folder, trainer state, training state) of the last checkpoint whose files are what was written.

    Broken ones after it are named and set aside as damaged-checkpoint-<step>, so that nothing takes them for the newest.

    Raises:
        InputError: if there is none.
    """
    broken = {}
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
            found = folder, read_trainer_state(folder), read_training_state(folder)
        except InputError as error:
            broken[folder] = error
            continue
        for other, error in broken.items():
            log.warning(f"warning: {error}; passed over, and kept as damaged-{other.name}")
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
        return found
    raise InputError(f"--resume: no checkpoint in {output_dir} is whole ({next(iter(broken.values()))}); pass --overwrite to begin "
                     f"again")


def as_flag(key, value):
    """A flag as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    if value is None:
        return f"no --{key}"
    return f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"


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


def prune_checkpoints(output_dir, keep_last):
    """Remove all but the last `keep_last` checkpoints and the best; keep what only resuming needs for the last two.

    A checkpoint of a run that was stopped between evaluations goes as soon as there is a newer one.
    """
    checkpoints = list_checkpoints(output_dir)
    state = read_trainer_state(checkpoints[-1])
    evaluated = {metrics["step"] for metrics in state["history"]}
    for folder in checkpoints[:-1]:
        is_recent = folder in checkpoints[-keep_last:]
        if step_of(folder) not in evaluated or not (is_recent or step_of(folder) == state["best_step"]):
            # A run that is killed here leaves nothing that looks like a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
    for folder in list_checkpoints(output_dir)[:-KEPT_TRAINING_STATES]:
        (folder / "training_state.pt").unlink(missing_ok=True)


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
    """Our part of a checkpoint's config.json: model, size, crop, tta, mean, std, classes, and the facts of the training data.

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
            and isinstance(ours.get("eval_dir"), str | None) and _are_counts(ours.get("class_counts"))):
        raise InputError(f"{folder / 'config.json'}: damaged; expected model, size, crop, mean, std, tta and facts of the dataset "
                         f"under {OUR_KEY!r}")
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
