"""kill -9 of random processes at random moments: 5 where SLURM must be tested, 20 by `make soak`.

Each kill comes after a new checkpoint, for a job that gains nothing between two crashes is rightly given up.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
from slurm_runs import KILLS, STEPS, check_draws_and_noise, durable_step, ends, newest_log, parameters

SEED = 20


@pytest.mark.skipif(KILLS == 0, reason="the soak takes about 20 s for each kill: DPSCALE_SOAK_KILLS=5, or make soak")
@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    choose = random.Random(SEED)
    ranks = [kill % 2 for kill in range(KILLS)]
    choose.shuffle(ranks)
    profile = cluster.profile(pace_s=0.05, max_crashes=KILLS)
    # A checkpoint every second step, so that every incarnation can gain one long before the run ends.
    job = cluster.submit(run, "checkpoint.every_steps=2", "--nodes", "2", "--profile", profile, "--via", "sbatch")
    expected = undisturbed(cluster)
    room = (STEPS - 10) // KILLS
    for kill, rank in enumerate(ranks):
        cluster.wait_for_restart(job, kill, run)
        cluster.wait_for_step(durable_step(run) + min(room, choose.randint(2, 6)), run)
        time.sleep(choose.uniform(0.0, 0.5))
        killed_at = time.time()
        os.kill(cluster.pid_of_rank(job, rank), signal.SIGKILL)
        cluster.wait("the end", lambda kill=kill: len(ends(run, job)) > kill, run, timeout_s=60)
        end = ends(run, job)[kill]
        assert end["decision"] == "requeue-after-crash", cluster.everything(run)
        print(f"rank {rank}: ended {end['at'] - killed_at:.0f} s after kill -9, at durable step {end['durable_step']}")
        cluster.wait_for_restart(job, kill + 1, run)
        # Nothing more is lost than that; a save that only its commit was missing of is not lost either.
        cluster.wait("the resumption", lambda end=end: resumed_at(run, job) >= end["durable_step"], run)
    cluster.wait_for_end(job, run)
    np.testing.assert_array_equal(parameters(run), expected)
    check_draws_and_noise(cluster, run, [job])
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len({line["attempt"] for line in ledger if "attempt" in line}) == 1  # no step was drawn anew


def resumed_at(run, job: str) -> int:
    found = re.search(r"resumed from the checkpoint of step (\d+)", newest_log(run, job))
    return int(found[1]) if found else -1
