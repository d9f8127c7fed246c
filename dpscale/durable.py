"""Writes that survive a crash: a file is either the old one or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE = 0o600


def write_atomically(path: Path, data: bytes | str, mode: int = PRIVATE) -> None:
    """Replace `path` by `data`: on disk, with `mode`, when this returns.

    Guarantees: a reader, or a crash at any moment, sees the whole old file or the whole new one.

    Raises: OSError from the file system; the old file is then untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.fchmod(descriptor, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def append_durably(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Append `data` and wait until it is on disk; the file is made with `mode` if there is none.

    Raises: OSError from the file system; what was written of `data` is then cut off again, as far as that is possible.
    """
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        before = os.fstat(descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    if is_new:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the directory's entries (a new file, a rename) are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
