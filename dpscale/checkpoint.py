"""Checkpoints: Orbax behind a small interface, with a manifest of our own, walking back over bad ones.

Orbax commits a save by renaming a directory; it does not notice a file truncated later, nor an empty directory with
a step's name. So process 0 writes a manifest (sizes and digests) after the commit, and a step counts as durable, for
the ledger and for the public metrics, only when its manifest is on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpscale.durable import sync_directory, write_atomically
from dpscale.errors import InputError, RunDirectoryError
from dpscale.state import TrainState

logger = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a run in one directory, one sub-directory a step.

    All processes call `save` and `restore`; only process 0 gets events from `poll` and decides in `newest_good`.

    Guarantees: a save that fails or is interrupted leaves every earlier good checkpoint as it was; the oldest are
    removed only after a newer one is durable.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._committer: threading.Thread | None = None
        self._saving: int | None = None
        self._durable: int | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Start saving `state` as `step`; returns when the device's values are copied. One save at a time.

        Args:
            facts: stored in the manifest (attempt, ledger head, ..); JSON values.

        Raises: InputError when an earlier save failed.
        """
        self.wait()
        self._saving, self._durable, self._error = step, None, None
        path = self._directory / str(step)
        if jax.process_index() == 0 and path.exists():
            self._set_aside(path, "a save that was never committed")
        try:
            self._checkpointer.save(path, args=ocp.args.StandardSave(_as_tree(state)))
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._committer = threading.Thread(target=self._commit, args=(step, path, facts), name="checkpoint-commit")
        self._committer.start()

    def poll(self) -> int | None:
        """The step whose checkpoint has become durable since the last call, or None; never blocks.

        Raises: InputError when the save failed (for example: the disk is full).
        """
        if self._committer is not None and self._committer.is_alive():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Wait for the save under way; the step that has become durable since the last call, or None.

        Raises: InputError when the save failed.
        """
        if self._committer is not None:
            self._committer.join()
            self._committer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failed(self._saving, error) from error
        durable, self._durable = self._durable, None
        return durable

    def close(self) -> None:
        """Wait for what is under way and release Orbax's threads."""
        if self._committer is not None:
            self._committer.join()
        self._checkpointer.close()

    def newest_good(self, report: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The newest step that is whole, and its manifest's facts; bad ones are moved to `bad/` and reported.

        A committed step without a manifest (the process died between the two) is whole if Orbax's own commit file is
        there; it gets its manifest at the next save. None when there is no checkpoint at all.

        Raises: RunDirectoryError when there were checkpoints and none of them is whole: never a silent fresh start.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._directory / str(step)
            fault, facts = _inspect(path)
            if fault is None:
                return step, facts
            self._set_aside(path, fault)
            report(f"checkpoint of step {step} is not usable ({fault}): moved to {self._directory / 'bad'}")
        if steps:
            raise RunDirectoryError(
                f"none of the {len(steps)} checkpoints in {self._directory} is whole (see {self._directory / 'bad'}): "
                "restore one from a backup, or start a new run in another directory"
            )
        return None

    def steps(self) -> list[int]:
        """Steps that have a directory, whole or not, in order."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read `step` into the shapes, dtypes and shardings of `abstract`, on any number of processes and devices.

        Raises: RunDirectoryError when Orbax cannot read it as this state.
        """
        path = self._directory / str(step)
        try:
            tree = self._checkpointer.restore(path, args=ocp.args.StandardRestore(_as_tree(abstract)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunDirectoryError(
                f"checkpoint {path} does not hold this model and optimizer ({type(error).__name__}: {error}): train "
                "with the config that made it, or in another run directory"
            ) from error
        return TrainState(**tree)

    def _commit(self, step: int, path: Path, facts: dict[str, Any]) -> None:
        """In a thread of its own: wait for Orbax's rename, then write the manifest and drop the oldest."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(path, step, facts)
                sync_directory(self._directory)
                self._durable = step
                for old in self.steps()[: -self._keep]:
                    if old < step:
                        shutil.rmtree(self._directory / str(old))
        except BaseException as error:
            self._error = error

    def _set_aside(self, path: Path, fault: str) -> None:
        logger.warning("moving %s aside: %s", path, fault)
        bad = self._directory / "bad"
        bad.mkdir(mode=0o700, exist_ok=True)
        number = sum(1 for other in bad.iterdir() if other.name.split("-")[0] == path.name)
        os.replace(path, bad / f"{path.name}-{number}")

    def _failed(self, step: int | None, error: BaseException) -> InputError:
        good = [known for known in self.steps() if known != step and _inspect(self._directory / str(known))[0] is None]
        last = f"the checkpoint of step {good[-1]} is whole" if good else "there is no earlier checkpoint"
        return InputError(
            f"the checkpoint of step {step} could not be written to {self._directory} ({error}); {last}. Free space or "
            "repair access, and start again: the run goes on from there"
        )


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(path: Path, step: int, facts: dict[str, Any]) -> None:
    files = {str(file.relative_to(path)): [file.stat().st_size, _file_digest(file)] for file in _files(path)}
    manifest = {"schema": SCHEMA, "step": step, "facts": facts, "files": files}
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def _inspect(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with a checkpoint, or None; the manifest's facts)."""
    manifest_file = path / MANIFEST
    if not manifest_file.exists():
        whole = (path / "_CHECKPOINT_METADATA").exists() and (path / "_METADATA").exists()
        return (None, {}) if whole else ("it was never completed", {})
    try:
        manifest = json.loads(manifest_file.read_text())
        schema, expected, facts = manifest["schema"], manifest["files"], manifest["facts"]
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read: {error}", {}
    if schema != SCHEMA:
        raise RunDirectoryError(f"{manifest_file} has schema {schema}, this dpscale reads {SCHEMA}: use the newer one")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}", {}
        if _file_digest(file) != digest:
            return f"{name} has other content than was written", {}
    return None, facts
