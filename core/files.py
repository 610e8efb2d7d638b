"""Write files and folders so that they are either complete or not there."""
import contextlib
import json
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`, which becomes `path` if the block succeeds.

    The temporary path (`.<name>.tmp`) may be written as a file or as a folder. It is flushed to
    disk before it is renamed, and deleted if the block fails. An existing file is replaced in one
    step; an existing folder is deleted first.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
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
    # Windows and some network file systems cannot flush folders or files opened for reading.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
