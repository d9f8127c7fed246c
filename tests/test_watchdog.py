"""The watchdog fires on a hang, with the place of the hang, and on nothing else."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap

import pytest

from dpscale.errors import InputError
from dpscale.watchdog import Watchdog


def run(body):
    code = "import sys, time\nfrom dpscale.watchdog import Watchdog\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)


def test_a_hang_ends_the_process_and_shows_where():
    ended = run("""
        def stuck_in_a_collective():
            time.sleep(30)
        dog = Watchdog(0.3, 10, sys.stderr)
        dog.step()
        stuck_in_a_collective()
    """)
    assert ended.returncode == 1
    assert "stuck_in_a_collective" in ended.stderr


def test_steps_and_grace_keep_it_quiet_and_close_ends_it():
    ended = run("""
        dog = Watchdog(0.4, 10, sys.stderr)
        for _ in range(6):
            dog.step()
            time.sleep(0.1)
        with dog.grace():
            time.sleep(0.6)
        dog.close()
        time.sleep(0.6)
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_grace_has_a_limit_too():
    assert run("with Watchdog(0.1, 0.3, sys.stderr).grace(): time.sleep(20)").returncode == 1


def test_slow_steps_raise_the_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dpscale.watchdog.time.monotonic", lambda: now[0])
    dog = Watchdog(300.0, 3600.0, None)
    for _ in range(5):
        dog.step()
        now[0] += 40.0
    assert dog.limit_s == 20 * 40.0


def test_an_evaluation_is_not_a_slow_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dpscale.watchdog.time.monotonic", lambda: now[0])
    dog = Watchdog(300.0, 3600.0, None)
    dog.step()
    now[0] += 40.0
    dog.step()
    with dog.grace():
        now[0] += 5000.0
    dog.step()
    assert dog.limit_s == 20 * 40.0


def test_off_never_fires():
    assert Watchdog.off().limit_s is None


def test_limits_come_from_the_environment():
    assert Watchdog.from_environment(io.StringIO(), {"DPSCALE_STEP_LIMIT_S": "20"}).limit_s == 20.0
    with pytest.raises(InputError, match="DPSCALE_STEP_LIMIT_S"):
        Watchdog.from_environment(io.StringIO(), {"DPSCALE_STEP_LIMIT_S": "0"})
