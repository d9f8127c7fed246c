"""One audit: canaries through the real sampler, feed, clipping, reduction and noise, and what their releases show."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpscale.audit.bound import Evidence, evidence, reach
from dpscale.audit.canaries import CanarySource, canary_task, fair_coins
from dpscale.audit.power import CANARY_NORM
from dpscale.audit.scores import SCORES, all_scores
from dpscale.batching import run_layout
from dpscale.config import RunConfig, load_config
from dpscale.data.source import ExampleSource
from dpscale.distributed import Membership, decided_by_process_zero, initialize, is_main
from dpscale.durable import write_atomically
from dpscale.errors import DpscaleError, InputError, RunDirectoryError
from dpscale.feed import Feed, blank_rows
from dpscale.gradients import compiled_steps, make_placement
from dpscale.loop import StepKeys, training_steps
from dpscale.mesh import data_mesh
from dpscale.metrics.progress import ProgressBar
from dpscale.observe import gradient_reader, observing
from dpscale.physical_batch import agreed_physical_batch_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler
from dpscale.state import Statistics
from dpscale.step import requests_array
from dpscale.stopping import StopRequests
from dpscale.task import Task, build_task
from dpscale.train import configure_jax, find_source
from dpscale.watchdog import Watchdog

RESULT = "audit.json"
RELEASED = "released.npz"


@dataclass(frozen=True)
class AuditResult:
    """`lower_bound`: refuted at `confidence`, the best of `evidence` (by score). `claimed`: epsilon of `steps` steps.

    `reach`: the largest lower bound that so many canaries can give. `lost_rows`: rows of all draws that were not
    finite, canaries among them perhaps: then the audit is partly blind.
    """

    claimed: float
    delta: float
    lower_bound: float
    confidence: float
    reach: float
    evidence: dict[str, Evidence]
    canaries: int
    included: int
    steps: int
    examples: int
    lost_rows: int
    run_dir: Path

    @property
    def violation(self) -> bool:
        """Whether the claim is refuted."""
        return self.lower_bound > self.claimed


def audit(
    config: RunConfig | str | os.PathLike[str],
    run_dir: str | os.PathLike[str] | None = None,
    *,
    canaries: int = 1000,
    steps: int | None = None,
    confidence: float = 0.95,
    model: Any = None,
    loss: Callable[..., jax.Array] | None = None,
    train_data: Any = None,
    plan: PrivacyPlan | None = None,
    progress: bool = True,
    stops: StopRequests | None = None,
    watchdog: Watchdog | None = None,
) -> AuditResult:
    """Train as `config` says with canaries among the examples, and bound epsilon from below by what was released.

    Args:
        config, model, loss, train_data, stops, watchdog: as for `dpscale.train`.
        run_dir: of the audit, never of a run; default runs/NAME-audit. An older audit there is replaced.
        canaries: how many records become canaries; each is included by a coin of its own.
        steps: fewer than the plan's, for a quick look; the claim is then epsilon of so many steps.
        confidence: that the lower bound holds, over all scores together.
        plan: of an earlier run of this config, to spare its calibration.
        progress: show a bar (plain lines when not on a terminal) on process 0.

    Guarantees: secret, coins, sampling and noise are the audit's own, drawn from the operating system; no other run's
    directory is read or written. The parameters are thrown away; the files (mode 0600) hold what was released along
    the canaries' directions, where the data's own gradients are zero.

    Raises: InputError where there is nothing to audit or the directory is not an audit's; DpscaleError when stopped.
    """
    config = config if isinstance(config, RunConfig) else load_config(config)
    stops, watchdog = stops or StopRequests(), watchdog or Watchdog.off()
    configure_jax(config)
    initialize(Membership.from_environment())
    stops.install()  # jax.distributed has taken SIGTERM
    directory = Path(run_dir or Path("runs") / f"{config.run.name}-audit").expanduser().absolute()
    source = find_source(config, train_data, config.data.train, "train")
    task = build_task(config, source.metadata, model, loss)

    def decide() -> dict[str, Any]:
        made = PrivacyPlan.from_config(config, num_examples=len(source), cached=plan)
        _check(made, steps, confidence)
        _prepare(directory)
        return {"plan": made.to_json(), "secret": os.urandom(32).hex()}  # the secret is in no file

    with ExitStack() as stack:
        stack.callback(stops.restore)
        stack.callback(watchdog.close)
        with watchdog.grace():
            told = decided_by_process_zero(decide)
            secret = RootSecret.from_process_zero(told["secret"], insecure=False)
            parts = _Parts(config, PrivacyPlan.from_json(told["plan"]), source, task, secret, canaries, steps, stack)
        released = parts.run(stops, watchdog, progress=progress and is_main())
    result = parts.judge(released, confidence, directory)
    if is_main():
        _write(result, released, parts.included)
    return result


class _Parts:
    """What an audit runs: the parts of a run, with canaries in the data, the loss and the optimizer."""

    def __init__(
        self,
        config: RunConfig,
        plan: PrivacyPlan,
        source: ExampleSource,
        task: Task,
        secret: RootSecret,
        canaries: int,
        steps: int | None,
        stack: ExitStack,
    ) -> None:
        assert plan.clip_norm is not None
        self.plan, self.secret, self.steps, self.clip_norm = plan, secret, steps or plan.steps, plan.clip_norm
        self.mesh = mesh = data_mesh()
        self.included = fair_coins(secret, canaries)
        self.lost_rows = 0
        source, metadata = CanarySource(source, self.included), source.metadata
        task = canary_task(task, metadata, canaries, CANARY_NORM * self.clip_norm)
        layout = run_layout(config, plan, agreed_physical_batch_size(config, plan, task, source, mesh.size), mesh.size)
        sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, secret.derive("sampling"), plan.max_batch_size)
        self.feed = Feed(mesh, source, sampler, layout, attempt=0, start_step=0, stop_step=self.steps, data=config.data)
        stack.callback(self.feed.close)
        placement = make_placement(config, plan, mesh, task.params)
        placement = replace(placement, optimizer=observing(placement.optimizer))
        self.state = placement.create(task.params)
        rows = blank_rows(mesh, source, layout, config.data)
        self.functions = compiled_steps(config, plan, task, placement, self.state, self.feed.table, rows)
        self.read = gradient_reader(placement, canaries)  # their leaf comes first among the parameters

    def run(self, stops: StopRequests, watchdog: Watchdog, *, progress: bool) -> np.ndarray:
        """Every step's release along each canary's direction, float64[steps, canaries], in clip norms."""
        released = []
        with ProgressBar(self.steps, self.plan.expected_batch_size) if progress else nullcontext() as bar:
            for info in training_steps(
                self.functions,
                self.state,
                self.feed.table,
                self.feed.batches,
                StepKeys(self.secret, 0),
                range(self.steps),
                lambda step: None,  # nothing is charged: the parameters are thrown away
                lambda: requests_array(self.mesh, stop=stops.reason is not None, save=False),
                self._arrived,
            ):
                watchdog.step()
                released.append(np.asarray(self.read(info.state).addressable_data(0), np.float64))
                if bar is not None:
                    bar.update(info.step)
        if len(released) < self.steps:
            raise DpscaleError(
                f"the audit was stopped after step {len(released)} of {self.steps}, without a verdict: start it again"
            )
        return np.stack(released) * self.plan.expected_batch_size / self.clip_norm

    def judge(self, released: np.ndarray, confidence: float, directory: Path) -> AuditResult:
        """What the releases show, score by score; the scores share the significance."""
        plan, significance = self.plan, (1 - confidence) / len(SCORES)
        assert plan.delta is not None
        scores = all_scores(released, plan.noise_multiplier)
        found = {name: evidence(values, self.included, plan.delta, significance) for name, values in scores.items()}
        return AuditResult(
            claimed=plan.epsilon_after(self.steps),
            delta=plan.delta,
            lower_bound=max(x.epsilon for x in found.values()),
            confidence=confidence,
            reach=reach(len(self.included), plan.delta, significance),
            evidence=found,
            canaries=len(self.included),
            included=int(self.included.sum()),
            steps=self.steps,
            examples=plan.num_examples,
            lost_rows=self.lost_rows,
            run_dir=directory,
        )

    def _arrived(self, step: int, statistics: Statistics) -> None:
        self.lost_rows += int(statistics.nonfinite)


def _check(plan: PrivacyPlan, steps: int | None, confidence: float) -> None:
    if not plan.enabled or plan.noise_multiplier == 0:
        raise InputError("without clip or noise nothing is claimed: set privacy.enabled and privacy.epsilon to audit")
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence={confidence}: choose one from 0.5 to below 1, such as 0.95")
    if steps is not None and not 1 <= steps <= plan.steps:
        raise InputError(f"steps={steps}: an audit takes 1 to {plan.steps} steps, the plan's own")


def _prepare(directory: Path) -> None:
    """A directory for the audit alone."""
    if (directory / "run.json").exists():
        raise RunDirectoryError(f"{directory} is a run's directory: an audit needs one of its own, see --run-dir")
    strangers = sorted(x.name for x in directory.iterdir()) if directory.is_dir() else []
    if strangers not in ([], ["attempts"]) and not (directory / RESULT).exists():
        raise RunDirectoryError(f"{directory} holds other files ({strangers[0]}, ..): choose another with --run-dir")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{directory} cannot be made ({error.strerror}): choose another --run-dir") from error


def _write(result: AuditResult, released: np.ndarray, included: np.ndarray) -> None:
    values = asdict(result) | {"run_dir": str(result.run_dir), "violation": result.violation}
    data = io.BytesIO()
    np.savez_compressed(data, released=released.astype(np.float32), included=included)
    write_atomically(result.run_dir / RELEASED, data.getvalue())
    write_atomically(result.run_dir / RESULT, json.dumps(values, indent=2) + "\n")
