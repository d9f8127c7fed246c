"""Whole runs on a real SLURM: every way to start, to be stopped and to fail ends with the undisturbed parameters."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from slurm_runs import ROOT, STEPS, check_draws_and_noise, durable_step, ends, newest_log, parameters, planted_at

from dpscale.metrics.status import read_status

TWO_TASKS = ("--nodes", "1", "--tasks-per-node", "2")
TWO_NODES = ("--nodes", "2")
FOUR_TASKS = ("--nodes", "2", "--tasks-per-node", "2")
# Two processes instead of one add the same clipped gradients in another order: float32 rounding, at most about
# 2^-24 x 100 examples of a sum of norm <= 1 in each of 120 steps with learning rate 0.5 / 100.
ANOTHER_PROCESS_COUNT = {"rtol": 0, "atol": 120 * 0.5 * 2**-24 * 100}


def test_submitit_sbatch_and_by_hand_give_the_same_parameters_also_beside_each_other_on_one_node(
    cluster, undisturbed, tmp_path
):
    by_submitit, by_hand = tmp_path / "by submitit", tmp_path / f"by hand; $(touch {tmp_path / 'ran'})"
    job = cluster.submit(
        by_submitit, "privacy.verify=true", *TWO_TASKS, "--sbatch-arg=--nodelist=t1", "--via", "submitit"
    )
    words = ("--parsable", "--ntasks-per-node=2", "--nodelist=t1", f"--output={tmp_path}/by-hand.out", "--time=30")
    run = {"DPSCALE_RUN_DIR": str(by_hand), "DPSCALE_PYTHON": cluster.python}
    other = cluster.command("sbatch", *words, str(ROOT / "slurm/train.sbatch"), str(cluster.config), **run).strip()
    expected = undisturbed(cluster)
    cluster.wait_for_end(job, by_submitit)
    cluster.wait_for_end(other, by_hand)
    one, two = cluster.state(job), cluster.state(other)
    assert one["NodeList"] == two["NodeList"] == "t1"
    assert max(one["StartTime"], two["StartTime"]) < min(one["EndTime"], two["EndTime"])  # side by side
    np.testing.assert_array_equal(parameters(by_submitit), expected)
    np.testing.assert_array_equal(parameters(by_hand), expected)
    assert "state          finished" in cluster.dpscale("status", str(by_hand))
    assert "finished 120 steps" in cluster.dpscale("logs", str(by_submitit))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_fails_in_every_way_ends_as_the_undisturbed_one(cluster, undisturbed, tmp_path):
    """One job: an exception on one rank, a stuck rank, kill -9 of a rank, real preemption; then it finishes."""
    run = tmp_path / "run"
    faults = [
        {"restart": 0, "rank": 1, "step": 25, "what": "raise"},
        {"restart": 1, "rank": 1, "step": 45, "what": "hang"},
    ]
    profile = cluster.profile(pace_s=0.05, faults=faults, step_limit_s=20, heartbeat_timeout_s=60)
    job = cluster.submit(run, *TWO_NODES, "--profile", profile, "--via", "sbatch")
    cluster.wait("the log of rank 1", lambda: list(run.glob("attempts/*/rank-1.log")), run)
    follow = [cluster.python, "-m", "dpscale", "logs", str(run), "--rank", "1", "-f"]
    with open(tmp_path / "followed", "w") as out:
        following = subprocess.Popen(follow, env=cluster.environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    expected = undisturbed(cluster)

    cluster.wait_for_restart(job, 1, run)
    end = ends(run, job)[0]
    assert end["decision"] == "requeue-after-crash"
    assert end["durable_step"] >= 20
    print(f"ended {end['at'] + 1 - planted_at(cluster, job, 0):.1f} s at most after an exception on rank 1")
    assert end["at"] - planted_at(cluster, job, 0) < 5
    crash = (run / "attempts" / f"{job}.0" / "crash" / "rank-1.txt").read_text()
    assert "a_planted_error" in crash
    assert "planted at step 25" in crash

    cluster.wait_for_restart(job, 2, run)
    end = ends(run, job)[1]
    assert end["decision"] == "requeue-after-crash"
    print(f"ended {end['at'] + 1 - planted_at(cluster, job, 1):.1f} s at most after rank 1 hung")
    assert 18 < end["at"] - planted_at(cluster, job, 1) < 30  # the watchdog's limit of 20 s
    assert "a_planted_hang" in (run / "attempts" / f"{job}.1" / "crash" / "rank-1.txt").read_text()

    cluster.wait_for_step(50, run)
    killed_at = time.time()
    os.kill(cluster.pid_of_rank(job, 0), signal.SIGKILL)
    cluster.wait_for_restart(job, 3, run)
    end = ends(run, job)[2]
    assert end["decision"] == "requeue-after-crash"
    print(f"ended {end['at'] + 1 - killed_at:.1f} s at most after kill -9 of rank 0")
    assert end["at"] - killed_at < 60

    cluster.wait_for_step(70, run)
    urgent = cluster.command("sbatch", "--parsable", "-N3", "-phigh", "-c4", "-o/dev/null", "--wrap=sleep 1").strip()
    cluster.wait("the end of the urgent job", lambda: cluster.state(urgent)["JobState"] == "COMPLETED", run)
    end = ends(run, job)[3]
    assert (end["code"], end["decision"]) == (75, "requeue"), cluster.everything(run)

    cluster.wait_for_end(job, run)
    assert ends(run, job)[-1]["code"] == 0
    assert durable_step(run) == STEPS
    np.testing.assert_array_equal(parameters(run), expected)
    check_draws_and_noise(cluster, run, [job])
    shown = cluster.dpscale("status", str(run))
    assert "restarts       4" in shown
    assert "saved its state and was queued again" in shown
    assert following.wait(timeout=10) == 0  # it ends with the run
    assert (tmp_path / "followed").read_text() == "".join(
        (run / "attempts" / f"{job}.{restart}" / "rank-1.log").read_text() for restart in range(5)
    )


def test_a_run_of_four_processes_goes_on_with_two_and_one(cluster, undisturbed, tmp_path):
    """Four processes until they are stopped, two until the time limit, one to the end; a second job is refused."""
    run = tmp_path / "run"
    job = cluster.submit(run, *FOUR_TASKS, "--profile", cluster.profile(pace_s=0.1), "--via", "sbatch")
    expected = undisturbed(cluster)
    cluster.wait_for_step(10, run)
    shown = cluster.dpscale("status", str(run))
    for part in ("state          running", "on t[1-2] in partition low", f"of {STEPS}", "checkpoint     step"):
        assert part in shown
    intruder = cluster.command(
        "sbatch", "--parsable", "--time=5", f"--output={tmp_path}/intruder.out",
        str(ROOT / "slurm/train.sbatch"), str(cluster.config),
        DPSCALE_RUN_DIR=str(run), DPSCALE_PYTHON=cluster.python,
    ).strip()  # fmt: skip
    cluster.wait("its refusal", lambda: ends(run, intruder), run)
    assert ends(run, intruder)[0]["code"] == 2
    assert "in use by" in (tmp_path / "intruder.out").read_text()

    cluster.dpscale("stop", str(run))
    cluster.wait_for_end(job, run)
    end = ends(run, job)[0]
    assert (end["code"], end["decision"]) == (0, "final")
    assert 10 <= end["durable_step"] < STEPS
    forgotten = run / "attempts" / "67000000.0"  # a job that SLURM knows no more, nor does its accounting
    forgotten.mkdir()
    assert "state          stopped" in cluster.dpscale("status", str(run))
    forgotten.rmdir()

    cluster.profile(pace_s=60 / (STEPS - end["durable_step"]))  # too slow for a minute
    second = cluster.dpscale("resume", str(run), "--tasks-per-node", "1", "--time", "0:01:00").split()[1]
    cluster.wait("the time limit", lambda: ends(run, second), run)
    [end] = ends(run, second)
    assert (end["code"], end["decision"]) == (75, "requeue"), cluster.everything(run)
    saved_at = end["durable_step"]
    assert saved_at < STEPS
    cluster.wait("the queue", lambda: cluster.state(second)["JobState"] == "PENDING", run)
    assert "was waiting: cancelled" in cluster.dpscale("stop", str(run))

    cluster.profile()
    last = cluster.dpscale("resume", str(run), "--nodes", "1", "--time", "0:30:00").split()[1]
    cluster.wait_for_end(last, run)
    assert f"resumed from the checkpoint of step {saved_at}" in newest_log(run, last)
    assert [len(list(cluster.drawn.glob(f"{each}.*"))) for each in (job, second, last)] == [4, 2, 1]
    check_draws_and_noise(cluster, run, [job, second, last])
    np.testing.assert_allclose(parameters(run), expected, **ANOTHER_PROCESS_COUNT)


def test_after_a_lost_node_damaged_checkpoints_are_set_aside_and_reported_and_never_a_silent_fresh_start(
    cluster, tmp_path
):
    run = tmp_path / "run"
    job = cluster.submit(run, *TWO_NODES, "--profile", cluster.profile(pace_s=0.1), "--via", "sbatch")
    cluster.wait("step 30 on record", lambda: committed_step(run) >= 30, run)
    lost_at = cluster.lose_node("t1")  # with the script, process 0 and the lease: only SLURM can act
    cluster.wait("its return", lambda: cluster.state(job)["JobState"] == "PENDING", run, timeout_s=60)
    assert not cluster.processes(f"SLURM_JOB_ID={job}")  # the other node's tasks have ended too
    print(f"queued again {time.time() - lost_at:.1f} s after its node was lost")

    newest = durable_step(run)
    half = run / "ckpt" / str(newest + 1)
    shutil.copytree(run / "ckpt" / str(newest), half)
    (half / "manifest.json").unlink()
    (run / "ckpt" / str(newest + 2)).mkdir()
    for checkpoint in (half, run / "ckpt" / str(newest)):
        truncate_largest_file(checkpoint)
    cluster.wait_for_restart(job, 1, run)
    assert cluster.state(job)["NodeList"] == "t[2-3]"
    going_on = f"resumed from the checkpoint of step {newest - 10}"
    cluster.wait(going_on, lambda: going_on in newest_log(run, job), run)
    cluster.wait_for_step(newest, run)
    log = newest_log(run, job)
    for step in (newest, newest + 1, newest + 2):
        assert f"checkpoint of step {step} is not usable" in log
        assert (run / "ckpt" / "bad" / f"{step}-0").exists()
    assert f"new attempt from step {newest - 10}, fresh batches and noise, charged on top" in log
    assert "restarts       1" in cluster.dpscale("status", str(run))

    cluster.dpscale("stop", str(run))
    cluster.wait_for_end(job, run)
    for checkpoint in (run / "ckpt").glob("[0-9]*"):
        truncate_largest_file(checkpoint)
    again = cluster.dpscale("resume", str(run)).split()[1]
    cluster.wait_for_end(again, run)
    assert [(end["code"], end["decision"]) for end in ends(run, again)] == [(2, "final")]
    assert "checkpoints in" in newest_log(run, again)
    assert "is whole" in newest_log(run, again)
    assert not (run / "finished").exists()
    cluster.local_cluster.start_node(cluster.files, "t1")
    cluster.wait("the node's return", lambda: cluster.command("sinfo", "-hnt1", "-plow", "-o%T") == "idle\n", run)


def committed_step(run: Path) -> int:
    return (read_status(run) or {}).get("checkpoint_step") or 0


def truncate_largest_file(directory: Path) -> None:
    largest = max((file for file in directory.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_elements_of_submitits_array_lose_nothing_by_an_early_end_a_signal_or_a_requeue_and_are_stopped_alone(
    cluster, undisturbed, tmp_path
):
    """What comes before the first step included: SLURM tells it to nobody, and the tasks find their end near."""
    setup = [f"while [[ ! -e '{tmp_path}'/go-$SLURM_ARRAY_TASK_ID ]]; do sleep 0.2; done"]
    profile = cluster.profile(pace_s=0.05, setup=setup)
    words = ["submit", str(cluster.config), "--sweep", "optimizer.learning_rate=0.4,0.5", "--run-dir", str(tmp_path)]
    printed = cluster.dpscale(*words, *TWO_TASKS, "--time", "0:30:00", "--profile", profile, "--via", "submitit")
    array = printed.split()[2].rstrip(",")  # also the number of the last element, in the names of its files
    other, run = tmp_path / "learning_rate=0.4", tmp_path / "learning_rate=0.5"
    job, other_job = f"{array}_1", f"{array}_0"
    cluster.wait("its start", lambda: cluster.state(job)["JobState"] == "RUNNING", run)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # as preemption does
    (tmp_path / "go-1").touch()
    cluster.wait("the queue", lambda: cluster.state(job)["JobState"] == "PENDING", run)
    assert [end["code"] for end in ends(run, array)] == [75], cluster.everything(run)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    cluster.wait_for_restart(job, 1, run)
    cluster.wait("the second start", lambda: list(run.glob("attempts/*.1/rank-1.log")), run)
    cluster.command("scancel", "--signal=USR2", job)

    (tmp_path / "go-0").touch()
    cluster.wait_for_step(10, other)
    cluster.command("scontrol", "requeue", other_job)
    cluster.wait("the queue", lambda: cluster.state(other_job)["JobState"] == "PENDING", other)
    assert f"job {other_job} was waiting: cancelled" in cluster.dpscale("stop", str(other))
    cluster.wait("its end", lambda: cluster.state(other_job)["JobState"] == "CANCELLED", other)
    shown = cluster.dpscale("status", str(other))
    assert f"job            {other_job} " in shown
    assert "restarts       1" in shown

    cluster.wait_for_restart(job, 2, run)
    assert [end["code"] for end in ends(run, array)] == [75, 75], cluster.everything(run)
    expected = undisturbed(cluster)
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
    facts = cluster.state(job)
    took = datetime.fromisoformat(facts["EndTime"]) - datetime.fromisoformat(facts["StartTime"])
    assert took.total_seconds() < 8 + 20  # the limit, and the time to start and to end
    assert ends(run, job)[0]["decision"] == "gave-up"  # nothing was gained: it is not queued again
    log = Path(run / "attempts" / f"job-{job}.log").read_text()
    assert "process(es) 1 (node t2) of 2 did not come within 8 s" in log
