"""What happens at the end of a task: exit codes, logs and crash files, for tasks that believe to be srun's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from srun_environment import srun_environment

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
[run]
name = "tasks"
[data]
train = "digits/train"
[model]
name = "mlp"
[training]
steps = 4
[privacy]
noise_multiplier = 1.0
delta = 1e-4
accountant = "rdp"
expected_batch_size = 100
insecure_seed = 1
"""
# Rank 1 fails in its second step, with an error that nobody expects.
FAILING = """
import os, runpy, sys
from dpscale.feed import Feed
batches = Feed.batches
def failing(self, step):
    if step == 1 and os.environ["SLURM_PROCID"] == "1":
        raise RuntimeError("a planted error")
    return batches(self, step)
Feed.batches = failing
sys.argv = ["launch.runtime", *sys.argv[1:]]
runpy.run_module("launch.runtime", run_name="__main__", alter_sys=True)
"""
# Rank 1 alone is asked to stop, as soon as Python listens, before jax is imported.
ASKED_AT_ONCE = """
import os, runpy, signal, sys
from dpscale.stopping import StopRequests
install = StopRequests.install
def installed(self):
    install(self)
    if "jax" not in sys.modules and os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGUSR2)
StopRequests.install = installed
sys.argv = ["launch.runtime", *sys.argv[1:]]
runpy.run_module("launch.runtime", run_name="__main__", alter_sys=True)
"""


def start(tmp_path, rank, size, *words, job, code=None):
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    what = ["-c", code] if code else ["-m", "launch.runtime"]
    return subprocess.Popen(
        [sys.executable, *what, "--logs", "--run-dir", str(tmp_path / "run"), "--", str(config), *words],
        env=base | srun_environment(job, rank, size) | {"JAX_PLATFORMS": "cpu", "DPSCALE_INIT_TIMEOUT_S": "60"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def a_job(offset):
    return str(1000 + offset * 400 + os.getpid() % 400)


def test_a_wrong_config_ends_with_2_and_says_so_everywhere(tmp_path):
    job = a_job(0)
    process = start(tmp_path, 0, 1, "model.name=42", "training.stepz=1", job=job)
    output = process.communicate(timeout=60)[0]
    attempt = tmp_path / "run" / "attempts" / f"{job}.0"
    assert process.returncode == 2
    for text in (output, (attempt / "rank-0.log").read_text(), (attempt / "crash" / "rank-0.txt").read_text()):
        assert "did you mean steps" in text
    assert oct((tmp_path / "run").stat().st_mode)[-3:] == "700"
    environment = json.loads((attempt / "env.json").read_text())
    assert environment["variables"]["SLURM_JOB_ID"] == job
    assert environment["packages"]["jax"]


@pytest.mark.slow
@pytest.mark.distributed
def test_an_input_that_all_refuse_ends_all_with_2(tmp_path):
    processes = [start(tmp_path, rank, 2, "data.train=/nowhere.npz", job=a_job(1)) for rank in (0, 1)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_of_one_process_ends_it_within_five_seconds_and_the_others_follow(tmp_path):
    job = a_job(2)
    processes = [start(tmp_path, rank, 2, job=job, code=FAILING) for rank in (0, 1)]
    processes[1].communicate(timeout=100)
    failed = time.monotonic()
    processes[0].communicate(timeout=60)
    codes = [process.returncode for process in processes]
    assert time.monotonic() - failed < 45  # without srun, which ends the others at once, the heartbeat does it
    assert codes[1] == 13
    assert codes[0] not in (0, 2, 75)
    crash = (tmp_path / "run" / "attempts" / f"{job}.0" / "crash" / "rank-1.txt").read_text()
    assert "a planted error" in crash
    assert "in failing" in crash  # where it happened


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_one_process_in_its_first_second_makes_all_save_at_one_step_and_ask_for_a_requeue(tmp_path):
    job = a_job(3)
    words = ("training.steps=50", "privacy.verify=false")
    processes = [start(tmp_path, rank, 2, *words, job=job, code=ASKED_AT_ONCE) for rank in (0, 1)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    [saved] = (tmp_path / "run" / "ckpt").glob("*/manifest.json")
    assert 0 < int(saved.parent.name) <= 3
    assert not list((tmp_path / "run" / "attempts").glob("*/crash/*"))
