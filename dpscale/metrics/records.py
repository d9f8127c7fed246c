"""One metric record: a step and some numbers, as one line of JSON; and which names may leave the run.

A name is public only if its value is the same on neighbouring data sets, or is computed from the released
(noised) parameters and data that the user declared public. Everything else is sensitive (PRIVACY.md 34).
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.metrics.files import explained

Record = dict[str, int | float | None]

PUBLIC_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "step": "logical steps finished",
        "attempt": "which attempt made this step; each attempt draws fresh batches and fresh noise",
        "epsilon": "privacy spent up to this step, replayed steps included",
        "delta": "the delta at which epsilon holds",
        "learning_rate": "the schedule's value, a function of the step alone",
        "validation_accuracy": "held-out accuracy, a fraction; only where the held-out data are public",
        "validation_loss": "mean held-out loss, nats; only where the held-out data are public",
        "validation_examples": "number of held-out examples; only where the held-out data are public",
    }
)
"""What a public record may hold, and nothing else: name -> meaning."""

SENSITIVE_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "train_loss": "mean loss over the drawn batch, before noise",
        "batch_size": "how many examples Poisson sampling drew",
        "clip_fraction": "share of the drawn examples whose whole gradient was longer than the clip norm",
        "mean_norm": "mean per-example gradient norm, before clipping",
        "mean_norm/GROUP": "the same of one group of parameters, with metrics.group_norms",
        "clip_fraction/GROUP": "share of the drawn examples whose gradient in one of privacy.clip_groups was clipped",
        "nonfinite_examples": "drawn examples whose gradient was not finite",
        "step_time_s": "wall time of the step, which follows the drawn batch's size",
        "validation_accuracy": "where the held-out data are private",
        "validation_loss": "where the held-out data are private",
        "validation_examples": "where the held-out data are private",
    }
)
"""What is known to be sensitive: name -> meaning. The sensitive stream takes other names as well."""


def check_public(values: Mapping[str, Any], *, validation_is: str | None) -> None:
    """Refuse any name that the whitelist lacks, and held-out metrics unless the held-out data are public.

    Raises: PrivacyError that names the key and where it may go.
    """
    for key in values:
        if key not in PUBLIC_KEYS:
            raise PrivacyError(
                f"{key!r} is not on the list of public metrics ({', '.join(PUBLIC_KEYS)}): write it to the "
                "sensitive stream (metrics/sensitive.jsonl, metrics.sensitive = true)."
            )
        if key.startswith("validation_") and validation_is != "public":
            raise PrivacyError(
                f"{key!r} is computed from held-out data that were not declared public (validation_is is "
                f"{validation_is!r}), and the guarantee covers training records only: write it to the sensitive "
                'stream (metrics/sensitive.jsonl), or say data.validation_is = "public" if that is true.'
            )


def encode(step: int, values: Mapping[str, Any]) -> bytes:
    """One line of JSON: sorted names, finite numbers (a non-finite one becomes null), a newline.

    Equal records give equal bytes. NumPy and JAX scalars are taken as the Python numbers they hold.

    Raises: ValueError for a step below 0, TypeError for a step that is no integer or a value that is no number.
    """
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise TypeError(f"step={step!r} is not an integer")
    if step < 0:
        raise ValueError(f"step={step} is below 0")
    record = {key: _number(key, value) for key, value in values.items()} | {"step": int(step)}
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def decode(line: bytes, path: Path) -> Record:
    """The record in one line of `path`. Raises: RunDirectoryError when the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise RunDirectoryError(
            f"{path} holds a line that is not a metric record: every line is one JSON object with a step. "
            "Move the file away to go on without its records."
        )
    return record


def complete_lines(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The newline-terminated lines of `path` from byte `offset`; a torn last line is left out.

    Edge cases: a missing file has no lines. Raises: RunDirectoryError when the file cannot be read.
    """
    with explained(path):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            yield from (line for line in file if line.endswith(b"\n"))


def read_records(path: Path) -> list[Record]:
    """All whole records of a JSON-lines file, in order. Raises: RunDirectoryError."""
    return [decode(line, path) for line in complete_lines(path)]


def _number(key: str, value: Any) -> int | float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{key}={type(value).__name__} is not a number: a metric record holds numbers only")
    number = float(value)
    return number if math.isfinite(number) else None
