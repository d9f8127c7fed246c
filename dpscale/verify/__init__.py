"""Whether the laws that epsilon rests on hold here: on these processes and devices, in the programs that will run.

Made-up rows go through the run's own compiled `accumulate`, and its `finalize` with an optimizer that only looks;
keys are of a secret made for the purpose. No example is read, nothing is charged, and nothing that is shown depends
on data.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

import jax
import numpy as np

from dpscale.config import RunConfig
from dpscale.distributed import decided_by_process_zero
from dpscale.errors import VerificationError as VerificationError
from dpscale.loop import StepKeys
from dpscale.placement import Placement
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.step import StepFunctions
from dpscale.task import Task
from dpscale.verify.bench import Bench, reference_gradient
from dpscale.verify.laws import Laws
from dpscale.verify.made_up import MadeUp as MadeUp
from dpscale.verify.release_laws import check_release
from dpscale.verify.sum_laws import check_sums

KEYS_COMPARED = 64


@dataclass(frozen=True)
class Extent:
    """`draws` of noise, unless that takes more than `most_steps`; `reference`: with jax.grad of one example."""

    draws: int
    most_steps: int
    reference: bool


AT_START = Extent(2**19, 256, True)
AFTER_RESTART = Extent(2**18, 32, False)
ALONE = Extent(2**23, 4096, True)


@dataclass(frozen=True)
class Verdict:
    """All laws hold. `largest`: norm of the largest contribution seen, in clip norms."""

    laws: tuple[str, ...]
    devices: int
    processes: int
    seconds: float
    draws: int
    stddev: float
    stddev_seen: float
    largest: float

    def line(self) -> str:
        """In one line."""
        processes = f" of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"verified: {len(self.laws)} laws on {self.devices} devices{processes} in {self.seconds:.1f} s (noise "
            f"{self.stddev_seen:.5g} of {self.stddev:.5g} over {self.draws:,} draws; largest contribution "
            f"{self.largest:.6g} of 1)"
        )

    def lines(self) -> list[str]:
        """With every law by name."""
        return [*(f"holds  {law}" for law in self.laws), self.line()]


def verify_steps(
    config: RunConfig,
    plan: PrivacyPlan,
    task: Task,
    placement: Placement,
    functions: StepFunctions,
    made_up: MadeUp,
    extent: Extent,
    run_keys: StepKeys | None = None,
) -> Verdict:
    """Check the steps of a run before its first one. All processes call it together.

    Args:
        functions: as the run will call them. made_up: of the layout and the data that they are compiled for.
        run_keys: of the run: compared between processes by digest, used for nothing.

    Raises: VerificationError, on every process, naming each law that does not hold, with what was seen and expected.
    """
    began = time.monotonic()
    secret = decided_by_process_zero(lambda: {"secret": os.urandom(32).hex()})["secret"]
    keys = StepKeys(RootSecret.from_process_zero(secret, insecure=False), 0)
    laws = Laws()
    _check_keys(laws, keys, run_keys, task)
    bench = Bench(config, plan, task, placement, functions, made_up, keys)
    largest = check_sums(bench, laws, reference_gradient(task, keys) if extent.reference else None)
    sample = check_release(bench, laws, extent.draws, extent.most_steps)
    return Verdict(
        laws=tuple(laws.settle()),
        devices=placement.mesh.size,
        processes=jax.process_count(),
        seconds=time.monotonic() - began,
        draws=sample.draws.size,
        stddev=sample.stddev,
        stddev_seen=sample.seen_stddev,
        largest=largest,
    )


def _check_keys(laws: Laws, keys: StepKeys, run_keys: StepKeys | None, task: Task) -> None:
    made = [own.noise(step).tobytes() for own in (keys, run_keys) if own is not None for step in range(KEYS_COMPARED)]
    laws.check("every step has a key of its own", len(set(made)) == len(made), "a key that comes back", "none")
    digest = hashlib.sha256(b"".join(made))
    for own in (keys, run_keys):
        if own is not None:
            digest.update(own.examples(0).tobytes())
    laws.same_everywhere("all processes have the same keys", digest.digest())
    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(task.params))
    laws.same_everywhere("all processes begin with the same parameters", leaves)
