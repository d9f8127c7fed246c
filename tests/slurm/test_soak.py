"""kill -9 of random processes at random moments: `DPSCALE_SOAK_KILLS=20 pytest tests/slurm/test_soak.py`.

Each kill comes after a new checkpoint, for a job that gains nothing between two crashes is rightly given up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from slurm_runs import STEPS, durable_step, ends, parameters

KILLS = int(os.environ.get("DPSCALE_SOAK_KILLS", "0"))
SEED = 20


@pytest.mark.skipif(KILLS == 0, reason="DPSCALE_SOAK_KILLS is not set: the soak takes about 20 s for each kill")
@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(cluster, undisturbed, tmp_path):
    expected = undisturbed(cluster)
    run = tmp_path / "run"
    choose = random.Random(SEED)
    profile = cluster.profile(pace_s=0.1, max_crashes=KILLS)
    # A checkpoint every second step, so that every incarnation can gain one long before the run ends.
    job = cluster.submit(run, "checkpoint.every_steps=2", "--nodes", "2", "--profile", profile, "--via", "sbatch")
    room = (STEPS - 10) // KILLS
    for kill in range(KILLS):
        cluster.wait_for_restart(job, kill, run)
        cluster.wait_for_step(durable_step(run) + min(room, choose.randint(2, 6)), run)
        time.sleep(choose.uniform(0.0, 0.5))
        rank = choose.randrange(2)
        os.kill(cluster.pid_of_rank(job, rank), signal.SIGKILL)
        cluster.wait("the end", lambda kill=kill: len(ends(run, job)) > kill, run, timeout_s=60)
        assert ends(run, job)[kill]["decision"] == "requeue-after-crash", cluster.everything(run)
    cluster.wait_for_end(job, run)
    np.testing.assert_array_equal(parameters(run), expected)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len({line["attempt"] for line in ledger if "attempt" in line}) == 1  # no step was drawn anew
