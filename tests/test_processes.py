"""Runs of several processes: one that moves between machines ends as one that never moved; all must be of one mind."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from test_distributed import run_together
from test_resume import StopAfter, ledger, run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SHARDED = {"update_sharding": "sharded"}

TOGETHER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from dpscale.distributed import Membership, initialize, leave
    initialize(Membership.from_environment())
    import jax
    from test_resume import StopAfter, run
    assert (jax.process_count(), jax.device_count()) == (2, 2)
    result = run(Path({run_dir!r}), stops=StopAfter({looks}) if {looks} else None, performance={performance!r})
    print("ended", result.state)
    leave()
"""


def on_two(run_dir, job: int, looks: int = 0, **performance) -> None:
    values = {"tests": os.path.dirname(__file__), "looks": looks, "run_dir": str(run_dir), "performance": performance}
    for code, output in run_together(TOGETHER.format(**values), str(job + os.getpid() % 400)):
        assert code == 0, output
        assert "ended " + ("stopped" if looks else "finished") in output, output


def test_whole_on_two_processes_then_sharded_on_eight_devices_then_on_two_processes_ends_as_one(tmp_path):
    """12 steps in three parts."""
    run_dir = tmp_path / "run"
    on_two(run_dir, 1000, looks=2)
    whole = committed(run_dir)
    run(run_dir, stops=StopAfter(2), performance=SHARDED)
    moved = committed(run_dir)
    on_two(run_dir, 1400, **SHARDED)
    assert 0 < whole < moved < 12 == committed(run_dir)
    assert ledger(run_dir).charged_steps == 12
    assert len(ledger(run_dir).attempts) == 1
    ended, expected = run(run_dir), run(tmp_path / "undisturbed")
    for mine, theirs in zip(jax.tree.leaves(ended.params), jax.tree.leaves(expected.params), strict=True):
        # Other draws, noise or momentum would move a parameter by about 1e-2; sums in another order by some 1e-6.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


def committed(run_dir) -> int:
    current = ledger(run_dir).current
    assert current is not None
    return current.committed


APART = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import jax
    import dpscale
    from dpscale.distributed import Membership, initialize, leave
    from dpscale.errors import DivergedError
    from test_train import FEATURES, LABELS, config
    initialize(Membership.from_environment())
    me = jax.process_index()
    reordered = (FEATURES[::-1].copy(), LABELS[::-1].copy())
    for data, rate in (((FEATURES, LABELS), 0.5 + me), (reordered if me else (FEATURES, LABELS), 0.5)):
        settings = config(optimizer={{"learning_rate": rate}})
        try:
            dpscale.train(settings, {run_dir!r}, train_data=data, progress=False, report=lambda line: None)
        except DivergedError as error:
            print("stopped:", error)
    leave()
"""


def test_processes_with_another_program_or_the_same_records_in_another_order_are_stopped_uncharged(tmp_path):
    """In another order each record has two indices: it could be in one batch twice, which no accountant knows."""
    values = {"tests": os.path.dirname(__file__), "run_dir": str(tmp_path / "run")}
    for code, output in run_together(APART.format(**values), str(1800 + os.getpid() % 400)):
        assert code == 0, output
        assert "stopped: the program (config, loss, versions) of process(es) [1] differs" in output
        assert "stopped: the training data of process(es) [1] differs" in output
    assert b'"open"' not in (tmp_path / "run" / "ledger.jsonl").read_bytes()
