"""Committed public records for TensorBoard, through tensorboardX (extra `tensorboard`)."""

from __future__ import annotations

import os
from pathlib import Path

from dpscale.errors import InputError
from dpscale.metrics.files import make_private_directory
from dpscale.metrics.records import Record

FLUSH_EVERY_S = 10


class TensorBoardWriter:
    """A listener for `PublicStream.on_commit` that writes event files under RUN/metrics/tensorboard.

    Guarantees: it sees committed records only, and stamps them with the time of the commit, so the event
    files tell nothing about single steps' times. Null values are left out.

    Edge cases: tensorboardX writes from a thread, so SIGKILL can lose the last FLUSH_EVERY_S seconds of
    points here; metrics/public.jsonl has them all.

    Raises: InputError when tensorboardX is not installed, RunDirectoryError when the folder cannot be made.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError(
                "metrics.tensorboard is on but tensorboardX is not installed: "
                "pip install 'dpscale[tensorboard]', or set metrics.tensorboard = false."
            ) from error
        metrics = Path(run_dir) / "metrics"
        make_private_directory(metrics)
        self._writer = SummaryWriter(logdir=str(metrics / "tensorboard"), flush_secs=FLUSH_EVERY_S)

    def __call__(self, record: Record) -> None:
        """Add every number of one record at its step; on disk by `close` at the latest."""
        step = int(record["step"] or 0)
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, global_step=step)

    def flush(self) -> None:
        """Put into the event files what the thread has taken up so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()
