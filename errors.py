"""Errors a user can mend: one line and exit status 2, never a traceback. A bug keeps its traceback.

`InputError` is raised wherever bad data, flags, files or hardware are noticed; every command ends in `run(main)`,
which prints it. `ArgumentParser` gives flags the same voice.
"""
import argparse
import errno
import multiprocessing
import os
import signal
import sys


class InputError(ValueError):
    """What was found, where, what was expected and the remedy, in one line."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help  # a default of nothing is told in words


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors; an abbreviated flag is a typo, not a guess."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def run(main):
    """Call `main` and leave the process: 0 or what it exits with, or 2 with one line on stderr for what the user can mend."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would raise for those that are killed here
        for child in multiprocessing.active_children():  # the loader's, which ignore SIGTERM
            child.kill()


def explain(error):
    """The one line for an error that the user can mend, or None for a bug.

    An exception from a DataLoader worker arrives with the worker's traceback as its text; only its last part is kept.
    """
    text = str(error)
    if isinstance(error, InputError):
        return text.rpartition("InputError: ")[2].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"disk full{_file(error)}: nothing half-written was kept; free some space and run the command again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"no permission{_file(error)}: change its permissions, or choose another place"
    # Its class is found by name, so that commands without torch need not import it.
    is_runtime = isinstance(error, RuntimeError)
    no_memory = "out of memory", "ALLOC_FAILED", "can't allocate memory"  # of CUDA and MPS, of its libraries, of the CPU
    if type(error).__name__ == "OutOfMemoryError" or (is_runtime and any(words in text for words in no_memory)):
        return "out of memory: lower --valid_batch_size, in training --batch_size (and raise --accumulation_steps) or --resize, too"
    if is_runtime and "does not have a deterministic implementation" in text:
        return f"--deterministic: {text.split(' ')[0]} never repeats itself exactly; pass another --model, or not this flag"
    if is_runtime and ("shared memory" in text or "bus error" in text.lower()):
        return "too little shared memory for the loader's workers: pass --num_workers 0, or enlarge /dev/shm"
    # A process that dies while it hands over a batch shows as a closed connection, or is missed later on.
    is_cut_off = isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError))
    if is_cut_off or "is killed by signal" in text or "exited unexpectedly" in text:
        return "a loader process was killed, often for lack of memory: lower --num_workers, and go on with --resume"
    return None


def reason(error):
    """The first line of what an exception says, at most 120 characters; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _file(error):
    return f" at {os.fspath(error.filename)}" if error.filename else ""
