"""Runs a task with a fault in it, as a site's container would: `with_fault.py FAULT.json PYTHON -m MODULE ...`.

FAULT.json: pace_s, seconds that each step takes longer; faults, a list of {restart, rank, step, what}, where what is
"raise", "hang" or "absent" (the process never joins the others).
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


def a_planted_hang():
    time.sleep(3600)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    here = (int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"]))
    mine = [fault for fault in plan["faults"] if (fault["restart"], fault["rank"]) == here]
    if any(fault["what"] == "absent" for fault in mine):
        a_planted_hang()
    module = sys.argv.index("-m") + 1
    name, sys.argv = sys.argv[module], sys.argv[module:]

    import dpscale.stopping

    seen = dpscale.stopping.StopRequests.install

    def install(self):  # called before jax is imported: an import of dpscale.feed here would delay the handlers
        seen(self)
        if "dpscale.feed" in sys.modules:
            plant(mine, plan["pace_s"])

    dpscale.stopping.StopRequests.install = install
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def plant(faults, pace_s) -> None:
    from dpscale.feed import Feed

    if getattr(Feed, "planted", False):
        return
    batches = Feed.batches

    def with_fault(self, step):
        time.sleep(pace_s)
        for fault in faults:
            if fault["step"] == step and fault["what"] == "raise":
                a_planted_error(step)
            if fault["step"] == step and fault["what"] == "hang":
                a_planted_hang()
        return batches(self, step)

    Feed.batches, Feed.planted = with_fault, True  # type: ignore[method-assign,attr-defined]


if __name__ == "__main__":
    main()
