"""Runs a task with a fault in it, as a site's container would: `with_fault.py FAULT.json PYTHON -m MODULE ...`.

FAULT.json: pace_s, seconds that each step takes longer; faults, a list of {restart, rank, step, what}, where what is
"raise", "hang" or "absent" (the process never joins the others); notes, a directory that gets JOB.RESTART.RANK, the
draw and the key of noise of every step, and fault-JOB.RESTART, when a fault came.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path


def a_planted_error(step):
    raise RuntimeError(f"planted at step {step}")


def a_planted_hang(step):
    time.sleep(3600)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    here = (int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"]))
    mine = [fault for fault in plan["faults"] if (fault["restart"], fault["rank"]) == here]
    if any(fault["what"] == "absent" for fault in mine):
        a_planted_hang(0)
    module = sys.argv.index("-m") + 1
    name, sys.argv = sys.argv[module], sys.argv[module:]

    import dpscale.stopping

    notes = Path(plan["notes"])
    seen = dpscale.stopping.StopRequests.install

    def install(self):  # called before jax is imported: an import of dpscale.feed here would delay the handlers
        seen(self)
        if "dpscale.feed" in sys.modules:
            plant(mine, plan["pace_s"], notes)

    dpscale.stopping.StopRequests.install = install
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def plant(faults, pace_s, notes) -> None:
    from dpscale.feed import Feed
    from dpscale.loop import StepKeys

    if getattr(Feed, "planted", False):
        return
    batches, key = Feed.batches, StepKeys.noise
    incarnation = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    training = False  # what is verified before is no step of the run
    record = open(notes / f"{incarnation}.{os.environ['SLURM_PROCID']}", "a", buffering=1)  # noqa: SIM115

    def with_fault(self, step):
        nonlocal training
        training = True
        time.sleep(pace_s)
        for fault in faults:
            if fault["step"] == step:
                (notes / f"fault-{incarnation}").write_text(str(time.time()))
                (a_planted_error if fault["what"] == "raise" else a_planted_hang)(step)
        record.write(f"draw {step} {self.draw_digest(step).hex()}\n")
        return batches(self, step)

    def noted(self, step):
        words = key(self, step)
        if training:
            record.write(f"noise {step} {words.tobytes().hex()}\n")
        return words

    Feed.batches, Feed.planted, StepKeys.noise = with_fault, True, noted


if __name__ == "__main__":
    main()
