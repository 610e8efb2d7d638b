"""Errors that a user can fix end in one line and exit status 2. Bugs keep their traceback."""
import errno
import os

# What to do about an error of the system.
DISK_FULL = ("no incomplete checkpoint was kept; free some space and run the command again "
             "(training: with --resume)")
PERMISSION = "change the permissions, or choose another path"
TOO_MANY_PROCESSES = "lower --num_workers, or end other programs"
TOO_MANY_FILES = "lower --num_workers, or raise the limit with ulimit -n 4096"
REMEDIES = {errno.ENOSPC: DISK_FULL, errno.EDQUOT: DISK_FULL, errno.EFBIG: DISK_FULL,
            errno.EACCES: PERMISSION, errno.EPERM: PERMISSION, errno.EROFS: PERMISSION,
            errno.EAGAIN: TOO_MANY_PROCESSES, errno.ENOMEM: TOO_MANY_PROCESSES,
            errno.EMFILE: TOO_MANY_FILES, errno.ENFILE: TOO_MANY_FILES}


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
    # A loader process that dies while it sends a batch looks like a closed connection.
    lost = ConnectionResetError, ConnectionRefusedError, ConnectionAbortedError, EOFError
    connection_lost = isinstance(error, lost)
    if isinstance(error, OSError) and error.errno is not None and not connection_lost:
        return _explain_os_error(error)

    is_runtime_error = isinstance(error, RuntimeError)
    if is_out_of_memory(error):
        return ("out of memory: lower --valid_batch_size; in training also lower --batch_size "
                "(and raise --accumulation_steps by the same factor) or --resize")
    if is_runtime_error and "does not have a deterministic implementation" in text:
        return (f"--deterministic: {text.split(' ')[0]} has no deterministic implementation; pass "
                f"another --model, or drop --deterministic")
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return ("--batch_size: the batch norm of this model needs two photos in each process; "
                "raise it, and lower --accumulation_steps by the same factor")
    if is_runtime_error and ("Too many open files" in text or "ancdata" in text):
        return f"too many open files: {TOO_MANY_FILES}"
    if is_runtime_error and ("shared memory" in text or "bus error" in text.lower()):
        return ("too little shared memory for the loader processes: pass --num_workers 0, or "
                "enlarge /dev/shm")
    ends = "is killed by signal", "exited unexpectedly", "terminated abruptly"
    if connection_lost or any(words in text for words in ends):
        return ("a loader process was killed, often for lack of memory: lower --num_workers, and "
                "run the command again (training: with --resume)")
    return None


def is_out_of_memory(error):
    """Return whether an exception says that the device or the machine has too little memory."""
    # The messages of CUDA and MPS, of CUDA's libraries, and of the CPU allocator. torch's class is
    # compared by its name: commands without torch need not import it.
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def as_one_line(error):
    """Return an exception's message as one line of at most 150 characters."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def _explain_os_error(error):
    words = {DISK_FULL: "disk full", PERMISSION: "no permission"}
    remedy = REMEDIES.get(error.errno, "check the path, and that its disk is mounted and works")
    what = words.get(remedy, error.strerror or as_one_line(error))
    path = error.filename
    if isinstance(path, bytes | os.PathLike):
        path = os.fsdecode(path)
    return f"{what}{'' if path in (None, '') else f' at {path}'}: {remedy}"
