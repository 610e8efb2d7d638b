"""Errors that a user can fix end in one line and exit status 2. Bugs keep their traceback."""
import errno
import os


class InputError(ValueError):
    """Bad data, flags, files or hardware: what was found, where, what was expected, what to do."""


def explain_error(error):
    """Return the one line for an error that the user can fix, or None for a bug.

    An exception from a DataLoader worker arrives with the worker's traceback as its text; only the
    last part of it is kept.
    """
    text = str(error)
    if isinstance(error, InputError):
        return text.rpartition("InputError: ")[2].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (f"disk full{_at_file(error)}: no incomplete checkpoint was kept; free some space "
                f"and run the command again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"no permission{_at_file(error)}: change the permissions, or choose another path"

    # torch's classes are compared by name, so that commands without torch need not import it.
    is_runtime_error = isinstance(error, RuntimeError)
    # The messages of CUDA and MPS, of CUDA's libraries, and of the CPU allocator.
    no_memory = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    if type(error).__name__ == "OutOfMemoryError" or (
            is_runtime_error and any(words in text for words in no_memory)):
        return ("out of memory: lower --valid_batch_size; in training also lower --batch_size "
                "(and raise --accumulation_steps by the same factor) or --resize")
    if is_runtime_error and "does not have a deterministic implementation" in text:
        return (f"--deterministic: {text.split(' ')[0]} has no deterministic implementation; pass "
                f"another --model, or drop --deterministic")
    if is_runtime_error and ("shared memory" in text or "bus error" in text.lower()):
        return ("too little shared memory for the loader processes: pass --num_workers 0, or "
                "enlarge /dev/shm")
    # A loader process that dies while it sends a batch looks like a closed connection.
    connection_lost = isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError))
    if connection_lost or "is killed by signal" in text or "exited unexpectedly" in text:
        return ("a loader process was killed, often for lack of memory: lower --num_workers, and "
                "continue with --resume")
    return None


def as_one_line(error):
    """Return an exception's message as one line of at most 150 characters."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def _at_file(error):
    return f" at {os.fspath(error.filename)}" if error.filename else ""
