"""Requests to stop: none is lost, none is invented."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dpscale.errors import InputError
from dpscale.stopping import StopRequests


@pytest.fixture
def stops():
    requests = StopRequests()
    requests.install()
    yield requests
    requests.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request(stops, number):
    assert stops.reason is None
    os.kill(os.getpid(), number)
    assert number.name in stops.reason


def test_the_deadline_is_a_request_the_margin_before():
    now = time.time()
    early = StopRequests.from_environment({"DPSCALE_DEADLINE": str(now + 100), "DPSCALE_STOP_MARGIN_S": "60"})
    late = StopRequests.from_environment({"DPSCALE_DEADLINE": str(now + 50), "DPSCALE_STOP_MARGIN_S": "60"})
    assert early.reason is None
    assert "time" in (late.reason or "")
    assert StopRequests.from_environment({}).reason is None
    with pytest.raises(InputError, match="DPSCALE_DEADLINE"):
        StopRequests.from_environment({"DPSCALE_DEADLINE": "soon"})


def test_a_stop_file_of_an_earlier_run_is_stale_but_not_for_a_requeued_job(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    file = tmp_path / "STOP"
    assert not StopRequests().is_stale(file)
    file.touch()
    os.utime(file, (time.time() - 60,) * 2)
    assert StopRequests().is_stale(file)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not StopRequests().is_stale(file)


def test_a_stop_file_written_after_the_start_is_kept(tmp_path):
    stops = StopRequests()
    file = tmp_path / "STOP"
    file.touch()
    os.utime(file, (time.time() + 1,) * 2)
    assert not stops.is_stale(file)
    stops.watch(file)
    assert "STOP" in (stops.reason or "")
