"""The two ways in which a run's metric files change: append whole lines, or replace the file in one move."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpscale.durable import sync_directory, write_atomically
from dpscale.errors import RunDirectoryError

PRIVATE_MODE = 0o600
SHARED_MODE = 0o644


class AppendFile:
    """A file that grows by whole writes; opened at the first of them, with its mode from creation.

    Guarantees: when `append` returns, the bytes are with the operating system, so SIGKILL cannot lose them
    (a power failure can, until `sync`). A private file that others could read is closed to them on opening.

    Edge cases: a failed `append` may leave a torn line at the end; the owner cuts it off with `truncate`.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self._mode = mode
        self._descriptor: int | None = None

    def append(self, data: bytes) -> None:
        """Write all of `data` at the end. Raises: RunDirectoryError when the system refuses."""
        with explained(self.path):
            descriptor = self._open()
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def sync(self) -> None:
        """Put what was appended on disk, with the directory entry. Raises: RunDirectoryError."""
        with explained(self.path):
            os.fsync(self._open())
            sync_directory(self.path.parent)

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes; nothing happens to a shorter one. Raises: RunDirectoryError."""
        with explained(self.path):
            descriptor = self._open()
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)

    def replace(self, chunks: Iterable[bytes]) -> None:
        """Put `chunks` in the file's place in one move; later appends go to the new file."""
        self.close()
        replace_file(self.path, chunks, self._mode)

    def close(self) -> None:
        """Let go of the file; the next `append` opens it again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor is None:
            make_private_directory(self.path.parent)
            self._descriptor = _open_for_writing(self.path, os.O_APPEND, self._mode)
        return self._descriptor


def replace_file(path: Path, chunks: Iterable[bytes], mode: int) -> None:
    """Write `chunks` to a file beside `path`, put it on disk, and rename it to `path`.

    Guarantees: at any moment `path` holds all of the old content or all of the new, also after a crash, and
    no file is ever open to more than `mode` allows.

    Raises: RunDirectoryError when the directory cannot be written or is full.
    """
    with explained(path):
        make_private_directory(path.parent)
        write_atomically(path, b"".join(chunks), mode)


def make_private_directory(path: Path) -> None:
    """Make `path` with mode 0700 unless it is there; its parent must exist."""
    with explained(path), contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal into an error that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path}: {error.strerror or error}. A run must be able to write its metrics: free some space or "
            "mend the permissions, then run the same command again; it goes on from the last checkpoint."
        ) from error


def _open_for_writing(path: Path, flag: int, mode: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode)
    if mode == PRIVATE_MODE:
        # The mode of os.open applies to new files only: one that was copied or left over may be open to others.
        os.fchmod(descriptor, mode)
    return descriptor
