"""RunDirectory: the one owner of every path of a run, and what must be true before a run may use it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpscale.durable import write_atomically
from dpscale.errors import RunDirectoryError

PRIVATE_DIRECTORY = 0o700
FROZEN = "frozen"


@dataclass(frozen=True)
class RunDirectory:
    """RUN/{config.toml, plan.json, run.json, secret.key, ledger.jsonl, ckpt/, metrics/, attempts/, lease, STOP, ..}.

    `root` is absolute. Independent of job ids, so that a requeued job finds its own state.
    """

    root: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The run directory at `path`, which need not exist yet."""
        return cls(Path(path).expanduser().absolute())

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def identity(self) -> Path:
        """Written last when a run directory is set up: where it exists, all else does."""
        return self.root / "run.json"

    @property
    def secret(self) -> Path:
        return self.root / "secret.key"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "ckpt"

    def frozen(self, digest: str) -> Path:
        """Weights that are not trained, by their digest; public, as the weights that training starts from."""
        return self.root / f"{FROZEN}-{digest[:16]}.safetensors"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def lease(self) -> Path:
        return self.root / "lease"

    @property
    def stop(self) -> Path:
        return self.root / "STOP"

    @property
    def finished(self) -> Path:
        return self.root / "finished"

    @property
    def model(self) -> Path:
        """What a release of the steps of the newest start says of the model and how it came to be (task.py).

        Every checkpoint's manifest holds that of the start that saved it.
        """
        return self.root / "model.json"

    @property
    def released(self) -> Path:
        """Which ledger line holds the run to the card of the newest release, so that its loss is noticed."""
        return self.root / "released.json"

    @property
    def ended(self) -> Path:
        """Where it exists the secret was destroyed, and the run is over for good."""
        return self.root / "ended.json"

    @property
    def plot(self) -> Path:
        return self.root / "plot.svg"

    def prepare(self) -> None:
        """Make the directory with mode 0700, or check that the one there can be used.

        Raises: RunDirectoryError when it is a file, cannot be made or written, or holds other things than a run.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
            probe = self.root / f".probe.{os.getpid()}"
            probe.touch(mode=0o600)
            probe.unlink()
        except FileExistsError as error:
            raise RunDirectoryError(f"{self.root} is a file: a run needs a directory. Choose another path") from error
        except OSError as error:
            raise RunDirectoryError(
                f"run directory {self.root} cannot be written ({error.strerror}): choose one that you own, with "
                "--run-dir, or repair its access"
            ) from error
        strangers = sorted(entry.name for entry in self.root.iterdir() if not self._is_ours(entry))
        if strangers and not self.identity.exists():
            raise RunDirectoryError(
                f"{self.root} holds files that are no run's ({', '.join(strangers[:3])}): choose an empty or new "
                "directory with --run-dir"
            )

    def refuse_if_ended(self) -> None:
        """Raises: RunDirectoryError where the secret was destroyed: no further step can be drawn."""
        if self.ended.exists():
            raise RunDirectoryError(
                f"{self.root} was ended for good by `dpscale release --destroy-secret`: without its secret no step can "
                "be drawn as it was promised. Start a new run in another directory (its epsilon comes on top)"
            )

    def remove_leftovers(self) -> None:
        """Delete what atomic writes of killed processes left behind. Call it with the lease held."""
        for directory in (self.root, self.root / "metrics"):
            for path in directory.glob(".*.tmp"):
                if f".{os.getpid()}." not in path.name:  # the lease's own thread may be writing
                    path.unlink(missing_ok=True)

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Replace a human-readable JSON file of the run, atomically."""
        write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read what `write_json` wrote.

        Raises: RunDirectoryError when it cannot be read or is no JSON object.
        """
        try:
            values = json.loads(self.read_text(path))
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(f"{path} is not JSON ({error}): restore it from where it was whole") from error
        if not isinstance(values, dict):
            raise RunDirectoryError(f"{path} holds no JSON object: restore it from where it was whole")
        return values

    def read_text(self, path: Path) -> str:
        """A text file of the run. Raises: RunDirectoryError when it cannot be read."""
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{path} cannot be read ({error}): restore it from where it was whole") from error

    def place(self) -> dict[str, Any]:
        """What tells this directory from a copy of it: a copy has another inode, a moved one another path."""
        return {"path": os.path.realpath(self.root), "inode": self.root.stat().st_ino}

    def _is_ours(self, entry: Path) -> bool:
        names = {"config.toml", "plan.json", "run.json", "secret.key", "ledger.jsonl", "ckpt", "metrics", "attempts"}
        names |= {
            "lease",
            "STOP",
            "finished",
            "status.json",
            "plot.svg",
            "plot.png",
            "report.html",
            "jax_cache",
        }
        names |= {"model.json", "released.json", "ended.json"}
        return entry.name in names or entry.name.startswith((".", f"{FROZEN}-"))
