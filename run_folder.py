"""The results folder of a run: whose it is, where a run goes on, which checkpoints stay.

checkpoint.py knows what is inside one checkpoint; this, what a run of train.py does with all of them.
"""
import errno
import logging
import os
import shlex
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a folder is not locked
    fcntl = None

import distributed
from checkpoint import list_checkpoints, read_trainer_state, read_training_state, step_of, verify
from errors import InputError

log = logging.getLogger("mask")

KEPT_TRAINING_STATES = 2
# Flags that a resumed run may change, because no number that was already computed depends on them.
RESUMABLE = {"data_dir", "output_dir", "resume", "overwrite", "num_workers", "log_interval", "keep_last", "device",
             "valid_batch_size", "patience"}


def check_output_dir(output_dir, resumes, overwrites, argv):
    """InputError if the results folder cannot be made, or holds a run and no flag says what to do with it."""
    path = next(path for path in [output_dir.absolute(), *output_dir.absolute().parents] if path.exists())
    if not path.is_dir():
        raise InputError(f"--output_dir {output_dir}: {path} is a file; expected a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {output_dir}: no permission to write in {path}; choose another --output_dir")
    if list_checkpoints(output_dir) and not resumes and not overwrites:
        other = next(f"{output_dir}-{n}" for n in range(2, 1000) if not Path(f"{output_dir}-{n}").exists())
        command = f"{distributed.command_prefix()} train.py {shlex.join([*argv, '--output_dir', other])}"
        raise InputError(f"--output_dir {output_dir}: already holds a run; pass --resume to go on with it, --overwrite to "
                         f"delete it, or run: {command}")


def lock_output_dir(output_dir):
    """Make the results folder this process's own until it ends, however it ends; the open file must be kept.

    What a killed run had only begun to write or to remove is removed.

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


def claim(output_dir, resumes, overwrites, argv):
    """Lock the results folder, check it once more, empty it if asked to, and note in it which start of torchrun this is.

    Returns:
        The lock; it must be kept open.

    Raises:
        InputError: as `lock_output_dir` and `check_output_dir`.
    """
    lock = lock_output_dir(output_dir)
    check_output_dir(output_dir, resumes, overwrites, argv)  # another run may have been there since
    if overwrites:
        delete_run(output_dir)
    print(distributed.start_id(), end="", file=lock, flush=True)
    return lock


def was_begun_by_this_start(output_dir):
    """Whether the run in a results folder is of this start of torchrun, which has started its processes again."""
    lock = output_dir / ".lock"
    return distributed.start_id() != "" and lock.is_file() and lock.read_text() == distributed.start_id()


def resume_argv(argv):
    """The flags that go on with a run begun with `argv`."""
    return [*(flag for flag in argv if flag not in ("--resume", "--overwrite")), "--resume"]


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


def update_best(state):
    """Note the newest evaluation as the best so far if it is; without validation the last counts as the best."""
    newest = state["history"][-1]
    if "macro_f1" not in newest:
        state["best_step"] = newest["step"]
    elif state["best_macro_f1"] is None or newest["macro_f1"] > state["best_macro_f1"]:
        state |= {"best_step": newest["step"], "best_macro_f1": newest["macro_f1"]}


def is_exhausted(state, patience):
    """Whether the last `patience` evaluations brought nothing better; never for 0."""
    since_best = [metrics for metrics in state["history"] if metrics["step"] > (state["best_step"] or 0)]
    return 0 < patience <= len(since_best)


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
