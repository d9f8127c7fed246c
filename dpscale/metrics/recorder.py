"""Recorder: what a run tells, and to whom: the two streams, the status, the bar, TensorBoard and the plot."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dpscale.clipping import NormGroups
from dpscale.config import RunConfig
from dpscale.metrics.plot import plot_run
from dpscale.metrics.progress import ProgressBar
from dpscale.metrics.records import Record, read_records
from dpscale.metrics.status import write_status
from dpscale.metrics.streams import PublicStream, SensitiveStream
from dpscale.metrics.tensorboard import TensorBoardWriter
from dpscale.privacy.plan import PrivacyPlan


class Recorder:
    """One process's metrics; all but process 0 make theirs with `enabled=False`, and it then does nothing."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        plan: PrivacyPlan,
        *,
        enabled: bool,
        norm_groups: NormGroups | None = None,
    ) -> None:
        self._run_dir, self._config, self._plan, self._enabled = run_dir, config, plan, enabled
        self._norm_groups = norm_groups
        self._public = PublicStream(run_dir, validation_is=config.data.validation_is, enabled=enabled)
        self._sensitive = SensitiveStream(run_dir, enabled=enabled and config.metrics.sensitive)
        self._tensorboard = TensorBoardWriter(run_dir) if enabled and config.metrics.tensorboard else None
        self._public.on_commit(self._remember)
        if self._tensorboard is not None:
            self._public.on_commit(self._tensorboard)
        self._released_accuracy: float | None = None
        self._recorded_step = -1
        self._guarantee = plan.enabled and config.privacy.insecure_seed is None
        self._attempt = 0
        self.verified_laws: int | None = None
        self.durable_step: int | None = None

    def recover(self, durable_step: int | None, attempt: int) -> None:
        """On start: release what the restored checkpoint covers, drop what will be made again."""
        self._attempt, self.durable_step = attempt, durable_step
        self._public.recover(durable_step)
        self._sensitive.recover(durable_step)
        public = self._run_dir / "metrics" / "public.jsonl"
        if public.exists():
            mine = [int(record["step"] or 0) for record in read_records(public) if record.get("attempt") == attempt]
            self._recorded_step = max(mine, default=-1)

    def evaluated(
        self, step: int, epsilon: float | None, learning_rate: float, validation: Mapping[str, float], examples: int
    ) -> None:
        """Record one evaluation; nothing of it is public before a checkpoint of this or a later step is durable."""
        if step <= self._recorded_step:
            return  # a finished run was started again: its last record is there
        self._recorded_step = step
        values: dict[str, Any] = {"attempt": self._attempt, "learning_rate": learning_rate}
        if epsilon is not None:
            values |= {"epsilon": epsilon, "delta": self._plan.delta}
        held_out = {f"validation_{name}": mean for name, mean in validation.items() if name in ("loss", "accuracy")}
        if held_out:
            held_out["validation_examples"] = examples
        if self._config.data.validation_is == "public":
            values |= held_out
        elif held_out:
            self._sensitive.write(step, **held_out)
        self._public.write(step, **values)

    def arrived(self, step: int, statistics: Any) -> None:
        """Record one step's statistics in the sensitive stream (`dpscale.step.Statistics`)."""
        finite = max(statistics.examples - statistics.nonfinite, 1.0)
        of_groups = {} if self._norm_groups is None else self._norm_groups.means(statistics.groups, finite)
        self._sensitive.write(
            step,
            train_loss=statistics.loss / finite,
            batch_size=int(statistics.examples),
            clip_fraction=statistics.clipped / finite,
            mean_norm=statistics.norm / finite,
            nonfinite_examples=int(statistics.nonfinite),
            **of_groups,
        )

    def commit(self, step: int) -> None:
        """A checkpoint of `step` is durable: what it covers becomes public."""
        self.durable_step = step
        self._public.commit(step)
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def status(self, state: str, step: int, epsilon: float | None) -> None:
        """Replace RUN/status.json."""
        if self._enabled:
            write_status(
                self._run_dir,
                state=state,
                step=step,
                steps=self._plan.steps,
                epsilon=epsilon,
                delta=self._plan.delta if self._plan.enabled else None,
                guarantee=self._guarantee,
                attempt=self._attempt,
                verified_laws=self.verified_laws,
                checkpoint_step=self.durable_step,
            )

    def progress(self, first: int, last: int, *, shown: bool) -> AbstractContextManager[ProgressBar]:
        """A bar for steps first to last; it draws nothing unless `shown`."""
        bar = ProgressBar(
            last,
            self._plan.expected_batch_size,
            epsilon_allowed=self._plan.epsilon_target,
            private=self._plan.enabled,
            start_step=first,
        )
        return bar if shown else nullcontext(bar)

    def shown_accuracy(self, validation: Mapping[str, float]) -> float | None:
        """Held-out accuracy as far as the bar may show it, beside the step that is under way.

        On the owner's terminal: this one, where it is public or was asked for with metrics.sensitive. Elsewhere, since
        a log may be shared: the newest public one whose step is durable.
        """
        if not sys.stderr.isatty():
            return self._released_accuracy
        may = self._config.data.validation_is == "public" or self._config.metrics.sensitive
        return validation.get("accuracy") if may else None

    def _remember(self, record: Record) -> None:
        accuracy = record.get("validation_accuracy")
        self._released_accuracy = self._released_accuracy if accuracy is None else float(accuracy)

    def plot(self) -> Path | None:
        """Draw the public records to RUN/plot.svg; None where matplotlib is missing or nothing was recorded.

        Raises: RunDirectoryError when a file cannot be read or written.
        """
        drawn = ("epsilon", "validation_accuracy")
        records = read_records(self._run_dir / "metrics" / "public.jsonl")
        if importlib.util.find_spec("matplotlib") is None:
            return None
        if not any(record.get(name) is not None for record in records for name in drawn):
            return None
        return plot_run(self._run_dir, epsilon_allowed=self._plan.epsilon_target, path=self._run_dir / "plot.svg")

    def close(self) -> None:
        """Let go of the files."""
        self._public.close()
        self._sensitive.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
