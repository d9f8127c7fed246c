"""The throw-away SLURM for a laptop, used by exactly the commands that it prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_runs import ROOT


@pytest.mark.usefixtures("session_cluster")  # skips or fails where SLURM is not installed
def test_the_printed_commands_submit_follow_and_stop_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.toml", tmp_path / "configs")
    environment = {name: value for name, value in os.environ.items() if name not in ("SLURM_CONF", "XLA_FLAGS")}
    environment["PYTHONPATH"] = str(ROOT)

    def shell(text: str) -> str:
        done = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        return done.stdout

    place = f"{tmp_path}/c"
    script = f"{sys.executable} {ROOT}/slurm/local-cluster/cluster.py"
    if len(place) > 70:
        place = f"/tmp/cluster-{os.getpid()}"
    export, submit, status, logs, stop, end = [
        line.strip() for line in shell(f"{script} start {place}").splitlines() if line.startswith("  ")
    ]
    try:
        again = subprocess.run([*script.split(), "start", place], capture_output=True, text=True, check=False)
        assert (again.returncode, "is not empty" in again.stderr) == (1, True)
        job = shell(f"{export}; {submit}").split()[1]
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/quickstart/attempts/*/rank-1.log")) and time.monotonic() < deadline:
            time.sleep(0.2)
        shown = shell(f"{export}; {status}")
        assert "state          running" in shown
        assert f"job            {job} on t[1-2] in partition low" in shown
        assert shell(f"{export}; {logs.removesuffix(' -f')}") is not None
        assert f"job {job} is running: it saves" in shell(f"{export}; {stop}")
    finally:
        shell(end)
    assert not Path(place).exists()
    assert not [process for process in Path("/proc").glob("[0-9]*") if mentions(process, place)]


def mentions(process: Path, place: str) -> bool:
    try:
        return place.encode() in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
    except OSError:
        return False
