"""Write files and folders so that they are either complete or not there."""
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from core.errors import InputError

DATASET_TABLES = {"train.csv", "info.csv", "answers.csv"}


@contextlib.contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`, which becomes `path` if the block succeeds.

    The temporary path (`.<name>.tmp`) may be written as a file or as a folder. It is flushed to
    disk before it is renamed, and deleted if the block fails. An existing file is replaced in one
    step; an existing folder is deleted first. A link stays: the file that it names is replaced. A
    device or pipe cannot be replaced: the finished file is copied into it.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "file")
            with open(Path(folder, "file"), "rb") as source, _open_stream(path) as target:
                shutil.copyfileobj(source, target)
        return
    temporary = _temporary(path)
    path = Path(os.path.realpath(path))
    delete(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _flush(file)
        if temporary.is_dir():
            delete(path)  # a folder cannot be renamed onto another
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        delete(temporary)
        raise


def _temporary(path):
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.tmp")


def _is_stream(path):
    # A name such as /dev/stdout stands for an open file, which must not be replaced either.
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return is_special or str(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))


def _open_stream(path):
    # An open file is used as it is: opened again, it would start at 0 and lose what was printed.
    names = {"/dev/stdout": "1", "/dev/stderr": "2"}
    number = names.get(str(path)) or re.sub(r"^(/dev|/proc/self)/fd/", "", str(path))
    if number.isdecimal():
        sys.stdout.flush()
        return open(os.dup(int(number)), "wb", 0)
    return open(path, "wb", 0)


def check_output(*paths, suffix=".csv"):
    """Check output files before the work.

    Args:
        paths: different files, or None.
        suffix: what the name of a file that may be replaced must end with.

    Raises:
        InputError: for a file that cannot be written, or must not be replaced.
        OSError: for a name that the system refuses.
    """
    paths = [path for path in paths if path]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise InputError(f"{paths[0]}: is named for two outputs; pass two different files")
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; expected the name of a file to write")
        if not _is_stream(path):
            temporary = _temporary(path)
            if not os.access(temporary.parent, os.W_OK):
                raise InputError(f"{path}: its folder does not exist, or is read-only; choose "
                                 f"another")
            temporary.touch()  # fails if the name is too long, for example
            delete(temporary)
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise InputError(f"{path}: is read-only; choose another file")
        # A mistyped name must not replace a photo, a model or a table of the dataset.
        target = Path(os.path.realpath(path))
        is_ours = target.suffix.lower() == suffix and target.name not in DATASET_TABLES
        if target.is_file() and not (is_ours or _is_stream(path) or target.stat().st_size == 0):
            raise InputError(f"{path}: would be replaced, but is not a {suffix} file of "
                             f"predictions; choose another file, or delete it")


def write_json(path, value):
    """Write a JSON file; NaN and infinity are refused."""
    Path(path).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def delete(path):
    """Delete a file or a folder if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path):
    # Some systems cannot flush folders (Windows, network file systems): flush what can be.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
