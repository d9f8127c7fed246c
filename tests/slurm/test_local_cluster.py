"""The throw-away SLURM for a laptop, used by exactly the commands that it prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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


SHARE = """
import json, os
from dpscale.slurm import SlurmTask, local_device_ids, visible_devices
task = SlurmTask.from_environment(os.environ)
own = local_device_ids(visible_devices(os.environ), task.local_tasks, task.local_id)
print(json.dumps([task.rank, os.environ["CUDA_VISIBLE_DEVICES"], own]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="fake GPUs are device files, which root alone can make")
@pytest.mark.parametrize(
    ("option", "seen"),
    [
        ("--gpus-per-node=2", [("0,1", [0]), ("0,1", [1])]),
        ("--gres=gpu:2", [("0,1", [0]), ("0,1", [1])]),
        ("--gpus-per-task=1", [("0", [0]), ("1", [0])]),
    ],
)
def test_each_task_takes_its_own_of_the_gpus_that_slurm_gives(option, seen, gpu_cluster):
    words = ["srun", "--nodes=2", "--ntasks-per-node=2", option, sys.executable, "-c", SHARE]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | gpu_cluster
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    shares = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert shares == [[rank, *seen[rank % 2]] for rank in range(4)]


@pytest.fixture(scope="module")
def gpu_cluster(session_cluster, start_and_stop):
    start, stop = start_and_stop
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield start(directory, nodes=2, gpus=2, cpus=4, first_job=1)
    stop(directory)
    shutil.rmtree(directory)
