"""train(): one run, top to bottom: build, open, restore, loop, close."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from dpscale.batching import BatchLayout, run_layout
from dpscale.checkpoint import Checkpoints
from dpscale.config import RunConfig, load_config
from dpscale.data.open import as_source, check_alike, check_apart, open_source
from dpscale.data.options import SourceOptions
from dpscale.data.resident import resident_shapes
from dpscale.data.source import ExampleSource
from dpscale.data.users import by_user, split_users
from dpscale.distributed import Membership, check_agreement, decided_by_process_zero, initialize, is_main
from dpscale.errors import InputError, VerificationError
from dpscale.evaluate import Evaluator
from dpscale.feed import Feed, blank_rows
from dpscale.gradients import check_groups, compiled_steps, make_placement, norm_groups
from dpscale.lease import Lease
from dpscale.loop import StepKeys, training_steps
from dpscale.mesh import data_mesh, place_replicated, replicated
from dpscale.metrics.files import explained
from dpscale.metrics.recorder import Recorder
from dpscale.optimizer import learning_rate_schedule
from dpscale.physical_batch import agreed_physical_batch_size
from dpscale.placement import Placement
from dpscale.privacy.ledger import Ledger
from dpscale.program import digest, program_facts
from dpscale.ranges import Opening, Ranges
from dpscale.replicas import ReplicaCheck, SentCheck
from dpscale.report import write_report
from dpscale.restore import restore
from dpscale.run_directory import RunDirectory
from dpscale.sampling import PoissonSampler
from dpscale.session import Briefing, ledger_facts, open_session
from dpscale.step import requests_array
from dpscale.stopping import StopRequests
from dpscale.task import (
    Task,
    build_task,
    example_shapes,
    has_digest,
    model_facts,
    release_facts,
    weights_digest,
)
from dpscale.verify import AFTER_RESTART, AT_START, MadeUp, verify_steps
from dpscale.watchdog import Watchdog
from dpscale.weights import write_weights

# Steps charged ahead where checkpoint.every_steps does not say: what a SIGKILL can leave charged until the resume.
DEFAULT_RANGE_STEPS = 100
SHOW_EPSILON_EVERY_S = 2.0
NO_DRAW = bytes(16)  # in a check of parameters alone


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    `state`: "finished", or "stopped" when it was asked to stop and saved. `wants_requeue`: stopped by a signal, not by
    its owner's STOP file. `params`: NumPy leaves; the average with training.evaluate_ema. `epsilon`: spent at `delta`,
    from the ledger; None without privacy. `epsilon_planned`: at the planned end, which is what holds when the stop was
    chosen by looking at outputs. `validation`: held-out means ("loss", "accuracy"), {} without held-out data.
    `plot`, `report`: files in the run directory, None where they could not be made.
    """

    state: Literal["finished", "stopped"]
    stop_reason: str | None
    wants_requeue: bool
    step: int
    steps: int
    epsilon: float | None
    epsilon_planned: float | None
    delta: float | None
    validation: dict[str, float]
    params: Any
    run_dir: Path
    checkpoint: Path | None
    metrics: Path
    plot: Path | None
    report: Path | None


def train(
    config: RunConfig | str | os.PathLike[str],
    run_dir: str | os.PathLike[str] | None = None,
    *,
    model: Any = None,
    loss: Callable[..., jax.Array] | None = None,
    train_data: Any = None,
    validation_data: Any = None,
    new_attempt: bool = False,
    report: Callable[[str], None] = print,
    progress: bool = True,
    stops: StopRequests | None = None,
    watchdog: Watchdog | None = None,
) -> TrainResult:
    """Train with differential privacy as `config` says, or go on from where `run_dir` was left.

    Args:
        config: a RunConfig, or the path of a TOML file.
        run_dir: everything that the run keeps; default runs/NAME. Calling again resumes.
        model: a flax module (linen or nnx) for one example, or a pytree of parameters; None: the config's model.
        loss: `loss(params, example)` or `loss(params, example, key)` of one example; None: chosen by the labels.
        train_data, validation_data: an ExampleSource, (features, labels) as NumPy arrays, or a dict of them with the
            keys "features" and "label"; None: what the config names. With `privacy.unit = "user"` train_data also
            has each record's user: (features, labels, users), a third key "user", or a `dpscale.data.users.UserSource`.
        new_attempt: go on although the program changed, with fresh batches and noise, charged on top.
        report: takes one line of text for the owner; called on process 0 only.
        progress: show a bar (plain lines when not on a terminal) on process 0.
        stops: listens for stop signals already; None: a listener for the time of this call.
        watchdog: ends the process when a step takes far too long; None: off.

    Guarantees: the sampler, the clip bound, the noise and epsilon come from one plan. Killed at any moment and called
    again, on any number of processes and devices, it uses the same draws and noise for steps whose results were never
    released, and charges every other repetition. No public metric of a step is written before a checkpoint of that or
    a later step is durable.

    Raises: InputError for a config, data or run directory that cannot be used; PrivacyError when going on would make
        the privacy statement untrue.
    """
    config = config if isinstance(config, RunConfig) else load_config(config)
    stops, watchdog = stops or StopRequests(), watchdog or Watchdog.off()
    stops.install()
    configure_jax(config)
    initialize(Membership.from_environment())
    directory = RunDirectory.at(run_dir or Path("runs") / config.run.name)
    source = find_source(config, train_data, config.data.train, "train")
    held_out = None
    if validation_data is not None or config.data.validation:
        held_out = find_source(config, validation_data, config.data.validation or "", "validation")
        check_alike(source, held_out)
        if config.privacy.enabled and config.data.validation_is == "public":
            check_apart(source, held_out)
    task = build_task(config, source.metadata, model, loss)
    check_groups(config, task.params)
    with ExitStack() as stack:
        stops.install()  # again: jax.distributed has taken SIGTERM
        stack.callback(stops.restore)
        told = report if is_main() else lambda line: None
        run = _Run(config, directory, source, held_out, task, stops, watchdog, told, stack)
        stack.callback(watchdog.close)
        with watchdog.grace():
            run.open(new_attempt=new_attempt)
            run.describe(model_facts(config, source.metadata, model=model, loss=loss))
            run.build()
        run.loop(progress=progress and is_main())
        with watchdog.grace():
            return run.close()


class _Run:
    """The parts of one call of `train`, in the order in which they come to be: open, build, loop, close."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        source: ExampleSource,
        held_out: ExampleSource | None,
        task: Task,
        stops: StopRequests,
        watchdog: Watchdog,
        report: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self.config, self.directory, self.source, self.held_out = config, directory, source, held_out
        self.task, self.stops, self.watchdog, self.report, self.stack = task, stops, watchdog, report, stack
        self.mesh = data_mesh()
        self.ledger: Ledger | None = None  # process 0 only, as is the lease
        self.lease: Lease | None = None
        self.range_end = 0
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.epsilon_shown_at = -math.inf
        self.model: dict[str, Any] = {}
        self.validation: dict[str, float] = {}

    def open(self, *, new_attempt: bool) -> None:
        """Let process 0 take the lease and decide; then everyone knows plan, secret, attempt and first step."""
        self.checkpoints = Checkpoints(self.directory.checkpoints, self.config.checkpoint.keep)
        self.stack.callback(self.checkpoints.close)
        example = example_shapes(self.source.metadata)
        whole = self.task.whole(self.task.params)
        self.program = program_facts(self.config, self.task.whole_loss, whole, example, self.task.uses_key)
        self.program |= self.task.weight_facts()
        fingerprint = self.source.fingerprint_parts()

        def decide() -> dict[str, Any]:
            self.directory.prepare()
            self.lease = Lease(self.directory.lease)
            self.lease.acquire()
            self.stack.callback(self.lease.release)
            if self.stops.is_stale(self.directory.stop):
                self.directory.stop.unlink()
            self.stops.watch(self.directory.stop)
            briefing, self.ledger = open_session(
                self.directory,
                self.config,
                len(self.source),
                fingerprint,
                self.program,
                self.checkpoints,
                new_attempt=new_attempt,
                report=self.report,
            )
            self._keep_frozen()
            return briefing.to_json()

        self.briefing = Briefing.from_json(decided_by_process_zero(decide))
        self.plan = self.briefing.plan
        facts = json.dumps(self.task.weight_facts(), sort_keys=True).encode()
        check_agreement("a pre-trained or frozen weight", facts, "Every node must read the same model.pretrained.")
        check_agreement("the program (config, loss, versions)", digest(self.program).encode(), "All must run one.")
        # A copy in another order has each record at two indices: it could be drawn twice, and that is not accounted.
        check_agreement("the training data", fingerprint, "Every node must read the same files: stage them again.")
        for line in self.task.notes:
            self.report(line)
        for warning in self.plan.warnings:
            self.report(f"warning: {warning}")
        groups = norm_groups(self.config, self.plan, self.task.params)
        self.metrics = Recorder(self.directory.root, self.config, self.plan, enabled=is_main(), norm_groups=groups)
        self.stack.callback(self.metrics.close)

    def _keep_frozen(self) -> None:
        """The weights that no step changes, under their digest's name, so that a release is whole."""
        if self.task.frozen is None:
            return
        digest = weights_digest(self.task.frozen)
        file = self.directory.frozen(digest)
        if file.exists() and has_digest(file, digest):
            return
        half = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        write_weights(half, self.task.frozen)
        os.replace(half, file)

    def describe(self, model: dict[str, Any]) -> None:
        """Note what a release of any step of this start must say; each checkpoint's manifest gets it too."""
        self.model = model | release_facts(self.config, self.task, self.program)
        if is_main():
            with explained(self.directory.model):
                self.directory.write_json(self.directory.model, self.model)

    def build(self) -> None:
        """Compile both step functions for their one shape, and place the state of the first step."""
        sampler = PoissonSampler(
            self.plan.num_examples,
            self.plan.sampling_rate,
            self.briefing.secret.derive("sampling"),
            self.plan.max_batch_size,
        )
        rows_per_device = self._physical_batch_size()
        layout = run_layout(self.config, self.plan, rows_per_device, self.mesh.size)
        placement = make_placement(self.config, self.plan, self.mesh, self.task.params)
        if self.task.frozen is not None:
            self.task = self.task.bind(place_replicated(self.mesh, self.task.frozen))
        self.schedule = learning_rate_schedule(self.config.optimizer, self.plan.steps)
        resident = self.config.data.residence == "device"
        table = resident_shapes(self.source, replicated(self.mesh)) if resident else {}
        rows = blank_rows(self.mesh, self.source, layout, self.config.data)
        state = placement.abstract(self.task.params)
        self.functions = compiled_steps(self.config, self.plan, self.task, placement, state, table, rows)
        if self.config.privacy.verify and self.plan.enabled and self.briefing.start_step < self.briefing.last_step:
            self._verify(layout, placement)
        if self.briefing.restore:
            self.state = restore(self.checkpoints, self.briefing.start_step, placement, self.task.params)
            self.saved_step = self.briefing.start_step
            self.report(f"resumed from the checkpoint of step {self.briefing.start_step}")
        else:
            self.state = placement.create(self.task.params)
        self.feed = Feed(
            self.mesh,
            self.source,
            sampler,
            layout,
            attempt=self.briefing.attempt,
            start_step=self.briefing.start_step,
            stop_step=self.briefing.last_step,
            data=self.config.data,
        )
        self.stack.callback(self.feed.close)
        self.check_replicas = ReplicaCheck(self.mesh)
        length = self.config.checkpoint.every_steps or DEFAULT_RANGE_STEPS
        self.ranges = Ranges(self.briefing.start_step, self.briefing.last_step, length)
        if self.held_out is not None:
            threads = self.config.data.num_threads
            self.evaluator = Evaluator(self.mesh, self.task.whole_metrics, self.held_out, rows_per_device, threads)
        self.metrics.recover(self.briefing.start_step if self.briefing.restore else None, self.briefing.attempt)

    def _verify(self, layout: BatchLayout, placement: Placement) -> None:
        """Before anything is charged, and before the devices hold the state and the data: there is room."""
        resident = self.config.data.residence == "device"
        made_up = MadeUp(self.mesh, layout, self.source.metadata, len(self.source), resident)
        keys = StepKeys(self.briefing.secret, self.briefing.attempt)
        extent = AFTER_RESTART if self.briefing.restore else AT_START
        where = {"devices": self.mesh.size, "processes": jax.process_count(), "whole": extent is AT_START}
        try:
            verdict = verify_steps(self.config, self.plan, self.task, placement, self.functions, made_up, extent, keys)
        except VerificationError:
            self._note_verification(where | {"laws": 0}, held=False)
            raise
        self._note_verification(where | {"laws": len(verdict.laws)}, held=True)
        self.report(verdict.line())

    def _note_verification(self, facts: dict[str, Any], *, held: bool) -> None:
        """In the ledger, before anything is charged; process 0 alone writes."""
        if self.ledger is not None:
            self.ledger.verified(self.briefing.attempt, self.briefing.start_step, held, facts)
        self.metrics.verified_laws = facts["laws"] if held else None

    def _physical_batch_size(self) -> int:
        rows = agreed_physical_batch_size(self.config, self.plan, self.task, self.source, self.mesh.size)
        if self.config.performance.physical_batch_size == "auto":
            self.report(f"physical batch: {rows} examples per device (performance.physical_batch_size = auto)")
        return rows

    def loop(self, *, progress: bool) -> None:
        """Run the steps; evaluate, save and record as the config says."""
        first, last = self.briefing.start_step, self.briefing.last_step
        every = self.config.training.evaluate_every_steps
        with self.metrics.progress(first, last, shown=progress) as bar:
            for info in training_steps(
                self.functions,
                self.state,
                self.feed.table,
                self.feed.batches,
                StepKeys(self.briefing.secret, self.briefing.attempt),
                range(first, last),
                self._charge,
                self._requests,
                self.metrics.arrived,
            ):
                self.state = info.state
                self.watchdog.step()
                if info.step < last:
                    bar.update(info.step, self._epsilon_now_and_then(info.step))
                if every and info.step % every == 0 and info.step < last:
                    bar.update(info.step, self._epsilon(info.step), accuracy=self._evaluate(info.step))
                if info.save or self._is_due(info.step):
                    self._save(info.step)
                if is_main():
                    self._commit(self.checkpoints.poll())
            bar.update(self._step(), self._epsilon(self._step()), accuracy=self._evaluate(self._step()))

    def close(self) -> TrainResult:
        """Save the last state, commit what it covers, and say how the run ended."""
        step, last = self._step(), self.briefing.last_step
        if self.saved_step != step:
            self._save(step)
        self._commit(self.checkpoints.wait())
        self._settle(step)
        finished = step >= last
        ended = decided_by_process_zero(self._how_it_stopped)
        plot = page = None
        if is_main():
            self.metrics.status("finished" if finished else "stopped", step, self._epsilon(step))
            plot = self.metrics.plot()
            if finished:
                head = None if self.ledger is None else self.ledger.head
                end = {"step": step, "epsilon": self._epsilon(step), "ledger_head": head}
                self.directory.write_json(self.directory.finished, end)
            page = self._report()
        return TrainResult(
            state="finished" if finished else "stopped",
            stop_reason=None if finished else ended["reason"],
            wants_requeue=not finished and ended["requeue"],
            step=step,
            steps=self.plan.steps,
            epsilon=self._epsilon(step),
            epsilon_planned=self._epsilon(last),
            delta=self.plan.delta if self.plan.enabled else None,
            validation=self.validation,
            params=jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), self._weights()),
            run_dir=self.directory.root,
            checkpoint=self.directory.checkpoints / str(step),
            metrics=self.directory.root / "metrics" / "public.jsonl",
            plot=plot,
            report=page,
        )

    def _report(self) -> Path | None:
        """The run's page; a page that cannot be made must not turn a finished run into a failed one."""
        try:
            return write_report(self.directory.root)
        except Exception as error:
            self.report(f"warning: no report was written ({error}); dpscale report {self.directory.root} tries again")
            return None

    def _how_it_stopped(self) -> dict[str, Any]:
        by_owner = self.directory.stop.exists()
        reason = "the file STOP was found" if by_owner else self.stops.reason or "another process got a signal"
        return {"reason": reason, "requeue": not by_owner}

    def _weights(self) -> Any:
        """What is evaluated and handed out: the parameters, or their average where the config says so."""
        return self.state.ema if self.config.training.evaluate_ema else self.state.params

    def _step(self) -> int:
        return int(self.state.step.addressable_data(0))

    def _epsilon(self, step: int) -> float | None:
        return self.plan.epsilon_after(self.briefing.charged_at(step)) if self.plan.enabled else None

    def _epsilon_now_and_then(self, step: int) -> float | None:
        """For the bar: composing takes tens of milliseconds, too long for every step. None: show the last one."""
        if time.monotonic() - self.epsilon_shown_at < SHOW_EPSILON_EVERY_S:
            return None
        self.epsilon_shown_at = time.monotonic()
        return self._epsilon(step)

    def _charge(self, step: int) -> None:
        """Open what begins with this step or soon after: all processes agree on it, and it is in the ledger.

        No process can begin a range before process 0 has opened it: it needs the results of a step that process 0 sends
        after this (`ranges.OPENED_AHEAD`). Before the first step there are no results yet, and all wait for process 0.
        """
        openings = self.ranges.before(step, self._send_check)
        if step == self.briefing.start_step:
            decided_by_process_zero(lambda: self._open(step, openings))
        else:
            self._open(step, openings)
        if openings:
            self.range_end = openings[-1].end

    def _open(self, step: int, openings: list[Opening]) -> dict[str, Any]:
        """Process 0's part: the ranges' lines, durable when this returns. {}: nothing that the others need."""
        if self.ledger is None or self.lease is None:
            return {}
        for opening in openings:
            self.lease.check()
            facts = ledger_facts(self.plan, self.program, self.mesh.size, self.mesh.devices.flat[0].device_kind)
            digest = self.briefing.secret.mac("fingerprint", b"state before the range/" + opening.checksum)
            facts |= {"state": digest, "state_step": opening.state_step}
            self.ledger.open_range(self.briefing.attempt, opening.start, opening.end, facts)
            self.metrics.status("running", step, self._epsilon(opening.end))
        return {}

    def _send_check(self, start: int) -> SentCheck:
        """Of the state that the next step starts from, and of the draw that the range's first step will use."""
        return self.check_replicas.send((self.state.params, self.state.ema), self.feed.draw_digest(start))

    def _requests(self) -> jax.Array:
        every_s = self.config.checkpoint.every_s
        save = is_main() and every_s is not None and time.monotonic() - self.saved_at >= every_s
        if save:
            self.saved_at = time.monotonic()  # one request, not one a step until it is read
        return requests_array(self.mesh, stop=self.stops.reason is not None, save=save)

    def _is_due(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def _evaluate(self, step: int) -> float | None:
        """Evaluate and record; the held-out accuracy as far as it may be shown."""
        if self.held_out is not None:
            with self.watchdog.grace():
                means = self.evaluator(self.task.whole(self._weights()))
            self.validation = {"accuracy" if name == "correct" else name: mean for name, mean in means.items()}
        rate = float(np.asarray(self.schedule(step)))
        examples = len(self.held_out) if self.held_out is not None else 0
        self.metrics.evaluated(step, self._epsilon(step), rate, self.validation, examples)
        return self.metrics.shown_accuracy(self.validation)

    def _save(self, step: int) -> None:
        with self.watchdog.grace():
            # Copying the state waits for the devices anyway; what they do not agree on must not become durable.
            self.check_replicas.send((self.state.params, self.state.ema), NO_DRAW).agreed()
            if is_main():
                self._commit(self.checkpoints.wait())
            if self.lease is not None:
                self.lease.check()  # whoever took the directory over saves there now
            head = self.ledger.head if self.ledger is not None else None
            facts = {"attempt": self.briefing.attempt, "ledger_head": head, "model": self.model}
            self.checkpoints.save(step, self.state, facts)
        self.saved_at, self.saved_step = time.monotonic(), step

    def _commit(self, durable: int | None) -> None:
        """A checkpoint of step `durable` is on disk: lower the charge to it, and let its metrics out."""
        if durable is None or self.ledger is None or self.lease is None:
            return
        self.lease.check()
        self.ledger.close(self.briefing.attempt, durable, max(durable, self.range_end))
        self.metrics.commit(durable)
        self.metrics.status("running", durable, self._epsilon(max(durable, self.range_end)))

    def _settle(self, step: int) -> None:
        """Nothing more will run and `step` is durable: charge what ran, and let out what was recorded since the save.

        The loop may have committed `step` before it knew that the run ends there, and before the last evaluation.
        """
        if self.ledger is None or self.ledger.current is None:
            return
        current = self.ledger.current
        if (current.committed, current.end) != (step, step):
            self.ledger.close(self.briefing.attempt, step, step)
        self.metrics.commit(step)


def find_source(config: RunConfig, given: Any, spec: str, which: str) -> ExampleSource:
    """The data set that the user gave, or the one that `spec` names; its users, where they are the unit of privacy."""
    given, users = split_users(given) if which == "train" else (given, None)
    records = _find_records(config, given, spec, which)
    return by_user(config, records, users) if which == "train" else records


def _find_records(config: RunConfig, given: Any, spec: str, which: str) -> ExampleSource:
    if given is not None:
        return as_source(given, num_classes=config.data.num_classes)
    if not spec:
        raise InputError(f"data.{which} is not set and no {which}_data was given: name a data set in the config")
    return open_source(spec, SourceOptions.from_config(config.data))


def configure_jax(config: RunConfig) -> None:
    """Settings that must come before the first use of a device."""
    if config.performance.deterministic and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if config.performance.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.performance.compilation_cache).expanduser()))
