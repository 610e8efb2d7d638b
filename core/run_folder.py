"""The results folder of a run: locking it, resuming from it, and which checkpoints to keep."""
import errno
import logging
import os
import shlex
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: results folders are not locked
    fcntl = None

from core import distributed
from core.checkpoint import (
    is_checkpoint,
    list_checkpoints,
    read_config,
    read_trainer_state,
    read_training_state,
    read_weights,
    step_of,
)
from core.cli import format_flag
from core.errors import InputError
from core.files import delete

log = logging.getLogger("mask")

NUM_TRAINING_STATES = 2  # checkpoints that keep training_state.pt
# Flags that a resumed run may change: no number that was already computed depends on them.
RESUMABLE = {"data_dir", "output_dir", "resume", "overwrite", "num_workers", "log_interval",
             "keep_last", "device", "valid_batch_size", "patience"}
# What a run writes beside its checkpoints.
RUN_FILES = ("events.out.tfevents.*", "args.txt", "log.jsonl", "valid_predictions.csv",
             "augmented_inputs.png", "confusion_matrix.png", "worst_mistakes.png", "curves.png",
             "reliability.png", "README.md")


def check_output_dir(output_dir, resume, overwrite, argv):
    """Check that the results folder is free, or that a flag says what to do with its run.

    Raises:
        InputError: if not; the message has a ready command with another folder.
    """
    if os.fsencode(output_dir).decode("utf-8", "replace") != str(output_dir):
        raise InputError(f"--output_dir {output_dir}: its name is not UTF-8, which TensorBoard "
                         f"cannot write; pass another folder")
    # The folder itself, or the nearest parent that exists.
    absolute = output_dir.absolute()
    path = next(path for path in [absolute, *absolute.parents] if os.path.lexists(path))
    if not path.is_dir():
        what = "a file" if path.exists() else f"a link to {os.readlink(path)}, which does not exist"
        raise InputError(f"--output_dir {output_dir}: {path} is {what}; expected a folder")
    # Files of another program must not be replaced. Every run writes .lock first.
    checkpoints, files = list_checkpoints(output_dir), run_files(output_dir)
    is_run = (output_dir / ".lock").exists() or any(map(is_checkpoint, checkpoints))
    if (files or checkpoints) and not is_run:
        raise InputError(f"--output_dir {output_dir}: holds {(files + checkpoints)[0].name}, which "
                         f"no run has written; pass another folder")
    if checkpoints and not resume and not overwrite:
        other = next(f"{output_dir}-{n}" for n in range(2, 1000)
                     if not Path(f"{output_dir}-{n}").exists())
        command = shlex.join([*argv, f"--output_dir={other}"])
        raise InputError(f"--output_dir {output_dir}: already holds a run; pass --resume to "
                         f"continue it, --overwrite to delete it, or run: "
                         f"{distributed.launch('train.py')} {command}")


def run_files(output_dir):
    """Return what a run wrote in its folder beside the checkpoints."""
    return [path for pattern in RUN_FILES for path in sorted(output_dir.glob(pattern))]


def open_output_dir(output_dir, resume, overwrite, argv):
    """Create and lock the results folder; with --overwrite, delete its old run.

    Returns:
        The lock: an open file. Closing it, or the end of the process, releases the lock.

    Raises:
        InputError: if another run is writing in it, and as `check_output_dir`.
    """
    check_output_dir(output_dir, resume, overwrite, argv)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / ".lock", "a")  # noqa: SIM115  (it stays open)
    try:
        if fcntl:
            # Not flock: a killed run's loader processes would hold that lock for some seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            lock.close()
            raise InputError(f"--output_dir {output_dir}: another run is writing in it; wait, or "
                             f"pass another --output_dir") from None
        log.warning(f"warning: {output_dir} cannot be locked ({error.strerror}); start no "
                    f"other run in it")
    # A run may have ended in it since the first check.
    check_output_dir(output_dir, resume, overwrite, argv)
    for leftover in output_dir.glob(".checkpoint-*.tmp"):  # of a killed run
        delete(leftover)
    if overwrite:  # delete what the old run wrote, and nothing else
        checkpoints = filter(is_checkpoint, list_checkpoints(output_dir))
        for path in [*checkpoints, *run_files(output_dir)]:
            delete(path)
    return lock


def open_run(args, state, argv):
    """Lock the results folder in process 0; with --resume, load the last checkpoint in all.

    It fills `state`, and sets args.weights to those that the run started from.

    Args:
        args, argv: the flags, parsed and as given.
        state: the `TrainerState` of a new run.

    Returns:
        (lock or None, training state or None).

    Raises:
        InputError: as `open_output_dir` and `resume_run`, and if the machines do not share the
            folder.
    """
    output_dir, lock = Path(args.output_dir), None
    with distributed.main_process_first():
        if distributed.rank() == 0:
            lock = open_output_dir(output_dir, args.resume, args.overwrite, argv)
        training_state = resume_run(output_dir, state) if args.resume else None
    args.weights = state.args["weights"]  # those that the run started from
    if len(set(distributed.all_gather_object(state.step))) > 1:
        raise InputError(f"--output_dir {output_dir}: the processes see different checkpoints; "
                         f"expected a folder that all machines share")
    return lock, training_state


def last_step(state, total_steps, patience):
    """Return the last step to train; if the run is complete, log that and return its step."""
    if state.step < total_steps and not should_stop_early(state, patience):
        return total_steps
    log.info(f"the run is complete: step {state.step}/{total_steps}; to continue, pass more "
             f"--epochs, or --patience 0 if it stopped early")
    return state.step


def recorded_flags(args):
    """Return the flags that trainer_state.json records; `resume_run` compares most of them."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in RESUMABLE}


def write_args(args):
    """Write the flags of a run to args.txt: `python train.py @results/args.txt` repeats it."""
    flags = [format_flag(name, value) for name, value in sorted(vars(args).items())
             if value is not None and name not in ("output_dir", "resume", "overwrite")]
    # One value as --flag=value, since it may begin with "-" or "@".
    flags = [["=".join(flag)] if len(flag) == 2 else flag for flag in flags]
    text = "".join(f"{shlex.join(flag)}\n" for flag in flags)
    Path(args.output_dir, "args.txt").write_bytes(os.fsencode(text))


def resume_command(argv):
    """Return the command that continues the run that was started with `argv`."""
    flags = [flag for flag in argv if flag not in ("--resume", "--overwrite")]
    return f"{distributed.launch('train.py')} {shlex.join([*flags, '--resume'])}"


def resume_run(output_dir, state):
    """Fill `state` from the last intact checkpoint; return its training state.

    Returns None if there is no checkpoint yet.

    Raises:
        InputError: if a flag or the dataset differs so that earlier steps would have been
            different, or if no checkpoint is intact.
    """
    if not list_checkpoints(output_dir):
        log.info(f"no checkpoint to resume from in {output_dir}: starting from step 0")
        return None
    folder, before, training_state = latest_valid_checkpoint(output_dir)
    unknown = before.args.keys() - state.args.keys()
    if unknown:
        raise InputError(f"--resume: {folder} is of another version of train.py, which had "
                         f"--{min(unknown)}; predict with it, or pass another --output_dir")
    # Compare the flags. More epochs are allowed: they continue the run.
    epochs = before.args.get("epochs")
    for name, value in state.args.items():
        more_epochs = name == "epochs" and epochs is not None and value > epochs
        # The checkpoint has the weights, and the fingerprint covers the other files.
        if name in ("weights", "soft_targets"):
            continue
        if name in before.args and before.args[name] != value and not more_epochs:
            old, new = (" ".join(format_flag(name, v)) for v in (before.args[name], value))
            raise InputError(f"--resume: this run had {old}, and {new} would change earlier "
                             f"steps; pass the same flag again, or another --output_dir")
    if before.data != state.data:
        raise InputError("--resume: the people, photos or labels of the dataset have changed, or a "
                         "file of --soft_targets; pass the --data_dir and files of this run, or "
                         "another --output_dir")
    for name in ("step", "epoch", "best_step", "best_macro_f1", "history"):
        setattr(state, name, getattr(before, name))
    state.args["weights"] = before.args.get("weights", state.args["weights"])
    log.info(f"resuming from {folder}")
    return training_state


def latest_valid_checkpoint(output_dir):
    """Return (folder, trainer state, training state) of the last checkpoint that can be read.

    Damaged checkpoints after it are named; `prune_checkpoints` deletes them later.

    Raises:
        InputError: if there is none.
    """
    damaged = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            read_config(folder)
            read_weights(folder)
            found = folder, read_trainer_state(folder), read_training_state(folder)
        except InputError as error:
            damaged.append(error)
            continue
        for error in damaged:
            log.warning(f"warning: {error}; training writes it again")
        return found
    raise InputError(f"--resume: no checkpoint in {output_dir} is intact ({damaged[0]}); pass "
                     f"--overwrite to start again")


def update_best(state):
    """Note the newest evaluation as the best if it is; without validation it always is."""
    # A tie keeps the earlier checkpoint.
    newest = state.history[-1]
    if "macro_f1" not in newest:
        state.best_step = newest["step"]
    elif state.best_macro_f1 is None or newest["macro_f1"] > state.best_macro_f1:
        state.best_step, state.best_macro_f1 = newest["step"], newest["macro_f1"]


def should_stop_early(state, patience):
    """Return whether the last `patience` evaluations brought no improvement; never for 0."""
    # Evaluations after the best one; before the first evaluation best_step is None.
    since_best = [metrics for metrics in state.history
                  if metrics["step"] > (state.best_step or 0)]
    return 0 < patience <= len(since_best)


def prune_checkpoints(output_dir, state, keep_last):
    """Delete all but the last `keep_last` checkpoints and the best, in process 0.

    A checkpoint that was written without an evaluation is deleted when a newer one exists, and
    damaged checkpoints of later steps, left from before a resume, are deleted, too.
    training_state.pt is kept in the last two.
    """
    if distributed.rank():
        return
    folders = list_checkpoints(output_dir)
    checkpoints = [folder for folder in folders if step_of(folder) <= state.step]
    evaluated = {metrics["step"] for metrics in state.history}
    for folder in folders:
        # The checkpoint of a stop signal has no score: it is needed only until the next one.
        is_recent = folder in checkpoints[-keep_last:] and step_of(folder) in evaluated
        if not is_recent and step_of(folder) not in (state.best_step, state.step):
            # Renamed first: a run that is killed here leaves no half-deleted checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
    for folder in list_checkpoints(output_dir)[:-NUM_TRAINING_STATES]:
        (folder / "training_state.pt").unlink(missing_ok=True)
