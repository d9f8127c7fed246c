"""Laws of RUN/status.json: a whitelist, mode 0600, the old status or the new one."""

import math
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.metrics.status import STATES, STATUS_KEYS, read_status, write_status


def test_what_was_written_is_read_with_the_time_of_writing(tmp_path):
    values = {"state": "running", "step": 3, "steps": 10, "epsilon": 0.5, "delta": 1e-5, "attempt": 0}
    write_status(tmp_path, **values, checkpoint_step=None)
    status = read_status(tmp_path)
    assert status is not None
    written = datetime.fromisoformat(status.pop("updated_at"))
    assert timedelta(0) <= datetime.now(UTC) - written < timedelta(minutes=5)
    assert status == {**values, "checkpoint_step": None}


@pytest.mark.parametrize("state", STATES)
def test_every_state_and_key_is_accepted(tmp_path, state):
    values = dict.fromkeys(STATUS_KEYS, 1) | {"state": state}
    write_status(tmp_path, **values)
    assert read_status(tmp_path) == values


def test_a_status_has_mode_0600_whatever_the_umask(tmp_path):
    previous = os.umask(0)
    try:
        write_status(tmp_path, state="running")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("key", ["batch_size", "train_loss", "step_time_s", "validation_accuracy", "Step"])
def test_a_key_that_is_not_on_the_whitelist_is_refused_and_the_old_status_stays(tmp_path, key):
    write_status(tmp_path, state="running", step=1)
    before = read_status(tmp_path)
    with pytest.raises(PrivacyError, match=key):
        write_status(tmp_path, state="running", step=2, **{key: 1.0})
    assert read_status(tmp_path) == before


@pytest.mark.parametrize("values", [{"state": "asleep"}, {"epsilon": math.nan}, {"epsilon": math.inf}])
def test_an_unknown_state_and_non_finite_numbers_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match=r"asleep|finite"):
        write_status(tmp_path, **values)
    assert read_status(tmp_path) is None


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_status_whole(tmp_path, monkeypatch, call):
    write_status(tmp_path, state="running", step=1)
    before = read_status(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if call == "write":
        monkeypatch.setattr(os, "fdopen", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(RunDirectoryError, match="No space left"):
        write_status(tmp_path, state="running", step=2)
    assert read_status(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0\0"])
def test_a_damaged_status_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"status\.json"):
        read_status(tmp_path)


def test_reading_a_status_imports_neither_jax_nor_numpy_nor_dp_accounting():
    program = (
        "import sys, dpscale.metrics.status\n"
        "heavy = {'jax', 'numpy', 'dp_accounting', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
