"""Laws of the run directory: what may be used, and what tells it from a copy."""

import shutil
import stat

import pytest

from dpscale.errors import RunDirectoryError
from dpscale.run_directory import RunDirectory


def test_a_new_directory_is_its_owners_alone(tmp_path):
    directory = RunDirectory.at(tmp_path / "deep" / "run")
    directory.prepare()
    assert stat.S_IMODE(directory.root.stat().st_mode) == 0o700
    assert not list(directory.root.iterdir())


def test_a_file_and_a_strangers_directory_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").touch()
    for name, message in (
        ("file", "is a file"),
        ("theirs", r"no run's \(thesis.tex\)"),
        ("file/below", "cannot be written"),
    ):
        with pytest.raises(RunDirectoryError, match=message):
            RunDirectory.at(tmp_path / name).prepare()


def test_a_copy_and_a_moved_directory_are_told_from_the_original(tmp_path):
    (tmp_path / "a").mkdir()
    place = RunDirectory.at(tmp_path / "a").place()
    (tmp_path / "link").symlink_to("a")
    assert RunDirectory.at(tmp_path / "link").place() == place
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert RunDirectory.at(tmp_path / "b").place() != place
    (tmp_path / "a").rename(tmp_path / "c")
    assert RunDirectory.at(tmp_path / "c").place() != place
    (tmp_path / "b").rename(tmp_path / "a")  # a copy in the original's place
    assert RunDirectory.at(tmp_path / "a").place() != place


def test_left_over_temporary_files_go_and_nothing_else(tmp_path):
    (tmp_path / "metrics").mkdir()
    kept = ["ledger.jsonl", "secret.key", ".lease.lock", "metrics/pending.jsonl"]
    for name in [*kept, ".plan.json.123.tmp", "metrics/.pending.jsonl.123.tmp"]:
        (tmp_path / name).touch()
    RunDirectory.at(tmp_path).remove_leftovers()
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()) == sorted(kept)
