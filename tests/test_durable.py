"""Laws of durable writes: the old file or the new one, never half of one."""

import os
import resource
import stat
from contextlib import contextmanager

import pytest

from dpscale.durable import append_durably, write_atomically


class Kill(BaseException):
    """Stands for SIGKILL."""


@contextmanager
def files_limited_to(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, call, when):
    path = tmp_path / "file"
    write_atomically(path, "old")
    real = getattr(os, call)

    def killed(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Kill

    monkeypatch.setattr(os, call, killed)
    with pytest.raises(Kill):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == ("new" if (call, when) == ("replace", "after") else "old")


def test_the_data_are_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_atomically(tmp_path / "file", "new")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with files_limited_to(10), pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "file", "n" * 100)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"file": "old"}


def test_a_failed_append_is_cut_off_again(tmp_path):
    append_durably(tmp_path / "file", b"old\n")
    with files_limited_to(10), pytest.raises(OSError, match="File too large"):
        append_durably(tmp_path / "file", b"n" * 100)
    assert (tmp_path / "file").read_bytes() == b"old\n"


def test_the_mode_is_what_was_asked_for_whatever_the_umask(tmp_path):
    previous = os.umask(0o077)
    try:
        write_atomically(tmp_path / "shared", "x", 0o644)
        write_atomically(tmp_path / "private", "x")
        append_durably(tmp_path / "appended", b"x")
    finally:
        os.umask(previous)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"shared": 0o644, "private": 0o600, "appended": 0o600}
