"""Whole runs on a real SLURM: every way to start, to be stopped and to fail ends with the undisturbed parameters."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
from slurm_runs import ROOT, STEPS, durable_step, ends, parameters

TWO_TASKS = ("--nodes", "1", "--tasks-per-node", "2")
TWO_NODES = ("--nodes", "2")
# Two processes instead of one add the same clipped gradients in another order: float32 rounding, at most about
# 2^-24 x 100 examples of a sum of norm <= 1 in each of 120 steps with learning rate 0.5 / 100.
ANOTHER_PROCESS_COUNT = {"rtol": 0, "atol": 120 * 0.5 * 2**-24 * 100}


def test_submitit_sbatch_and_by_hand_give_the_same_parameters(cluster, undisturbed, tmp_path):
    expected = undisturbed(cluster)
    by_submitit, by_hand = tmp_path / "by submitit", tmp_path / f"by hand; $(touch {tmp_path / 'ran'})"
    job = cluster.submit(by_submitit, *TWO_TASKS, "--via", "submitit")
    words = ("--parsable", "--ntasks-per-node=2", f"--output={tmp_path}/by-hand.out", "--time=30")
    run = {"DPSCALE_RUN_DIR": str(by_hand), "DPSCALE_PYTHON": cluster.python}
    other = cluster.command("sbatch", *words, str(ROOT / "slurm/train.sbatch"), str(cluster.config), **run).strip()
    cluster.wait_for_end(job, by_submitit)
    cluster.wait_for_end(other, by_hand)
    np.testing.assert_array_equal(parameters(by_submitit), expected)
    np.testing.assert_array_equal(parameters(by_hand), expected)
    assert "state          finished" in cluster.dpscale("status", str(by_hand))
    assert "finished 120 steps" in cluster.dpscale("logs", str(by_submitit))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_fails_in_every_way_ends_as_the_undisturbed_one(cluster, undisturbed, tmp_path):
    """One job: an exception on one rank, a stuck rank, kill -9 of a rank, real preemption; then it finishes."""
    expected = undisturbed(cluster)
    run = tmp_path / "run"
    faults = [
        {"restart": 0, "rank": 1, "step": 25, "what": "raise"},
        {"restart": 1, "rank": 1, "step": 45, "what": "hang"},
    ]
    profile = cluster.profile(pace_s=0.1, faults=faults, step_limit_s=20, heartbeat_timeout_s=60)
    job = cluster.submit(run, *TWO_NODES, "--profile", profile, "--via", "sbatch")

    cluster.wait_for_restart(job, 1, run)
    end = ends(run, job)[0]
    assert end["decision"] == "requeue-after-crash"
    assert end["durable_step"] >= 20
    crash = (run / "attempts" / f"{job}.0" / "crash" / "rank-1.txt").read_text()
    assert "a_planted_error" in crash
    assert "planted at step 25" in crash

    cluster.wait_for_restart(job, 2, run)
    assert ends(run, job)[1]["decision"] == "requeue-after-crash"
    assert "a_planted_hang" in (run / "attempts" / f"{job}.1" / "crash" / "rank-1.txt").read_text()

    cluster.wait_for_step(50, run)
    killed_at = time.time()
    os.kill(cluster.pid_of_rank(job, 0), signal.SIGKILL)
    cluster.wait_for_restart(job, 3, run)
    end = ends(run, job)[2]
    assert end["decision"] == "requeue-after-crash"
    assert end["at"] - killed_at < 60

    cluster.wait_for_step(70, run)
    urgent = cluster.command("sbatch", "--parsable", "-N2", "-phigh", "-c2", "-o/dev/null", "--wrap=sleep 1").strip()
    cluster.wait("the end of the urgent job", lambda: cluster.state(urgent)["JobState"] == "COMPLETED", run)
    end = ends(run, job)[3]
    assert (end["code"], end["decision"]) == (75, "requeue"), cluster.everything(run)

    cluster.wait_for_end(job, run)
    assert ends(run, job)[-1]["code"] == 0
    assert durable_step(run) == STEPS
    np.testing.assert_array_equal(parameters(run), expected)
    shown = cluster.dpscale("status", str(run))
    assert "restarts       4" in shown
    assert "saved its state and was queued again" in shown


def test_a_stop_file_saves_and_leaves_and_another_number_of_processes_goes_on(cluster, undisturbed, tmp_path):
    expected = undisturbed(cluster)
    run = tmp_path / "run"
    job = cluster.submit(run, *TWO_NODES, "--profile", cluster.profile(pace_s=0.1), "--via", "sbatch")
    cluster.wait_for_step(10, run)

    intruder = cluster.command(
        "sbatch", "--parsable", "--time=5", f"--output={tmp_path}/intruder.out",
        str(ROOT / "slurm/train.sbatch"), str(cluster.config),
        DPSCALE_RUN_DIR=str(run), DPSCALE_PYTHON=cluster.python,
    ).strip()  # fmt: skip
    cluster.wait_for_end(intruder, run)
    assert ends(run, intruder)[0]["code"] == 2
    assert "in use by" in (tmp_path / "intruder.out").read_text()

    cluster.dpscale("stop", str(run))
    cluster.wait_for_end(job, run)
    end = ends(run, job)[0]
    assert (end["code"], end["decision"]) == (0, "final")
    stopped_at = end["durable_step"]
    assert 10 <= stopped_at < STEPS

    again = cluster.dpscale("resume", str(run), "--nodes", "1", "--profile", "generic").split()[1]
    cluster.wait_for_end(again, run)
    log = (run / "attempts" / f"{again}.0" / "rank-0.log").read_text()
    assert f"resumed from the checkpoint of step {stopped_at}" in log
    np.testing.assert_allclose(parameters(run), expected, **ANOTHER_PROCESS_COUNT)


def test_a_signal_before_the_first_step_and_a_requeue_from_outside_lose_nothing(cluster, undisturbed, tmp_path):
    expected = undisturbed(cluster)
    run = tmp_path / "run"
    job = cluster.submit(run, *TWO_TASKS, "--profile", cluster.profile(pace_s=0.1), "--via", "submitit")
    cluster.wait("the first process", lambda: list(run.glob("attempts/*/rank-1.log")), run)
    cluster.command("scancel", "--signal=USR2", job)
    cluster.wait_for_restart(job, 1, run)
    assert [end["code"] for end in ends(run, job)] == [75], cluster.everything(run)

    cluster.wait_for_step(durable_step(run) + 20, run)
    cluster.command("scontrol", "requeue", job)
    cluster.wait_for_end(job, run)
    np.testing.assert_array_equal(parameters(run), expected)


def test_a_process_that_never_comes_is_named_with_its_node(cluster, tmp_path):
    run = tmp_path / "run"
    faults = [{"restart": 0, "rank": 1, "step": 0, "what": "absent"}]
    profile = cluster.profile(faults=faults, init_timeout_s=8)
    job = cluster.submit(run, *TWO_NODES, "--profile", profile, "--via", "sbatch")
    cluster.wait_for_end(job, run)
    assert ends(run, job)[0]["decision"] == "gave-up"  # nothing was gained: it is not queued again
    log = Path(run / "attempts" / f"job-{job}.log").read_text()
    assert "process(es) 1 (node t2) of 2 did not come within 8 s" in log
