"""RUN/status.json: where the run is, for `dpscale status`, which must answer without importing jax."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.metrics.files import PRIVATE_MODE, explained, replace_file

STATES = ("running", "stopped", "finished", "failed")
NUMBERS = ("step", "steps", "epsilon", "delta", "verified_laws", "checkpoint_step")
NUMBER = (int, float, type(None))

STATUS_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "state": "one of " + ", ".join(STATES),
        "step": "logical steps finished",
        "steps": "logical steps planned",
        "epsilon": "privacy charged so far, to the end of the range that was begun; null without privacy",
        "delta": "the delta at which epsilon holds, null without privacy",
        "guarantee": "false where a fixed seed stands in place of the secret: epsilon then says nothing",
        "attempt": "which attempt is running",
        "updated_at": "when this was written, UTC, ISO 8601",
        "verified_laws": "how many laws were checked and held before this start's first step; null where none were",
        "checkpoint_step": "step of the newest durable checkpoint, null where there is none",
    }
)
"""What the status may hold, and nothing else: name -> meaning. None of it depends on the records."""


def write_status(run_dir: str | os.PathLike[str], **values: Any) -> None:
    """Replace RUN/status.json by `values` (names as in STATUS_KEYS); `updated_at` is now unless given.

    Guarantees: mode 0600; a reader sees the old status or the new, never half of one.

    Raises: PrivacyError for any other name, ValueError for an unknown state or a number that is not finite,
    RunDirectoryError when the file cannot be written.
    """
    for key in values:
        if key not in STATUS_KEYS:
            raise PrivacyError(
                f"{key!r} is not on the list of what a status may show ({', '.join(STATUS_KEYS)}): "
                "write it to the sensitive stream (metrics/sensitive.jsonl)."
            )
    if "state" in values and values["state"] not in STATES:
        raise ValueError(f"state={values['state']!r} is none of {', '.join(STATES)}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is not finite: a status holds finite numbers or None")
    status = {"updated_at": datetime.now(UTC).isoformat(timespec="seconds")} | values
    text = json.dumps(status, sort_keys=True, indent=1) + "\n"
    replace_file(Path(run_dir) / "status.json", [text.encode()], PRIVATE_MODE)


def read_status(run_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_status` last wrote; None where the run has not written any.

    Raises: RunDirectoryError when the file cannot be read or is not a JSON object.
    """
    path = Path(run_dir) / "status.json"
    with explained(path):
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    if not isinstance(status, dict) or any(not isinstance(status.get(key, 0), NUMBER) for key in NUMBERS):
        raise RunDirectoryError(f"{path} is not a run's status (one JSON object): remove it; the run writes a new one.")
    return status
