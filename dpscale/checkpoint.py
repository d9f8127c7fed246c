"""Checkpoints: Orbax behind a small interface, with a manifest of our own, walking back over bad ones.

Orbax commits a save by renaming a directory; it does not notice a file truncated later, nor an empty directory with
a step's name. So process 0 writes a manifest (sizes and digests) after the commit, and a step counts as durable, for
the ledger and for the public metrics, only when its manifest is on disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpscale.errors import InputError, RunDirectoryError
from dpscale.manifest import MANIFEST, Found, inspect, saved_steps, write_manifest
from dpscale.state import OptimizerShards, TrainState

logger = logging.getLogger(__name__)

SHARDS = "opt_shards"  # the name of an optimizer state that is cut over the devices
REMOVED = ".removed-"
ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that Orbax has not renamed yet


class Checkpoints:
    """The checkpoints of a run in one directory, one sub-directory a step.

    All processes call `save` and `restore`; only process 0 gets events from `poll` and decides in `newest_good`.

    Guarantees: a save that fails or is interrupted leaves every earlier good checkpoint as it was; the oldest are
    removed only after a newer one is durable.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        logging.getLogger("absl").addFilter(_is_not_orbax)
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

    def newest_good(self, report: Callable[[str], None], committed: int) -> Found | None:
        """The newest step that is whole; bad ones are moved to `bad/` and reported. Process 0 only.

        What interrupted saves and removals left behind is deleted. A checkpoint without a manifest is whole only where
        the process can have died between the two: it is the newest, newer than `committed` (the ledger's last committed
        step), and every array can be read. `adopt` then gives it its manifest. None when there is no checkpoint.

        Raises: RunDirectoryError when there were checkpoints and none of them is whole: never a silent fresh start.
        """
        self._remove_leftovers()
        steps = self.steps()
        for step in reversed(steps):
            path = self._directory / str(step)
            if (path / MANIFEST).exists() or step != steps[-1] or step <= committed:
                fault, facts = inspect(path)
            else:
                fault, facts = _unreadable(path), {}
            if fault is None:
                return Found(step, facts)
            self._set_aside(path, fault)
            report(f"checkpoint of step {step} is not usable ({fault}): moved to {self._directory / 'bad'}")
        if steps:
            raise RunDirectoryError(
                f"none of the {len(steps)} checkpoints in {self._directory} is whole (see {self._directory / 'bad'}): "
                "restore one from a backup, or start a new run in another directory"
            )
        return None

    def adopt(self, found: Found, facts: dict[str, Any]) -> None:
        """Write the manifest that a checkpoint lacks; does nothing where it has one. Process 0 only."""
        path = self._directory / str(found.step)
        if not (path / MANIFEST).exists():
            write_manifest(path, found.step, facts)

    def steps(self) -> list[int]:
        """Steps that have a directory, whole or not, in order."""
        return saved_steps(self._directory)

    def contents(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds: the tree under "step", "params", .., with Orbax's metadata in place of each array.

        Raises: RunDirectoryError when Orbax cannot tell.
        """
        path = self._directory / str(step)
        try:
            metadata = self._checkpointer.metadata(path).item_metadata
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunDirectoryError(f"checkpoint {path} cannot be read ({error}): restore it from a backup") from error
        if metadata is None:
            raise RunDirectoryError(f"checkpoint {path} does not say what it holds: restore it from a backup")
        return dict(metadata.tree)

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
        tree["opt_state"] = tree.pop(SHARDS) if SHARDS in tree else tree["opt_state"]
        return TrainState(**tree)

    def _commit(self, step: int, path: Path, facts: dict[str, Any]) -> None:
        """In a thread of its own: wait for Orbax's rename, then write the manifest and drop the oldest."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(path, step, facts)
                self._durable = step
                self._drop_old(step)
        except BaseException as error:
            self._error = error

    def _drop_old(self, newest: int) -> None:
        for old in self.steps()[: -self._keep]:
            if old < newest:
                # Renamed first: half of a removed checkpoint must not look like one.
                removed = self._directory / f"{REMOVED}{old}"
                shutil.rmtree(removed, ignore_errors=True)
                os.replace(self._directory / str(old), removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name.startswith(REMOVED) or ORBAX_UNFINISHED in path.name:
                    shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path, fault: str) -> None:
        logger.warning("moving %s aside: %s", path, fault)
        bad = self._directory / "bad"
        bad.mkdir(mode=0o700, exist_ok=True)
        number = sum(1 for other in bad.iterdir() if other.name.split("-")[0] == path.name)
        os.replace(path, bad / f"{path.name}-{number}")

    def _failed(self, step: int | None, error: BaseException) -> InputError:
        good = [known for known in self.steps() if known != step and inspect(self._directory / str(known))[0] is None]
        last = f"the checkpoint of step {good[-1]} is whole" if good else "there is no earlier checkpoint"
        return InputError(
            f"the checkpoint of step {step} could not be written to {self._directory} ({error}); {last}. Free space or "
            "repair access, and start again: the run goes on from there"
        )


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs tracebacks of what it also raises; the user gets one message, from here."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _as_tree(state: TrainState) -> dict[str, Any]:
    """The state by names that tell what lies how: "opt_state" or "opt_shards", and "ema" where there is one."""
    opt_name = SHARDS if isinstance(state.opt_state, OptimizerShards) else "opt_state"
    tree = {"step": state.step, "params": state.params, opt_name: state.opt_state}
    return tree if state.ema is None else {**tree, "ema": state.ema}


def read_parameters(path: Path, name: Literal["params", "ema"]) -> Any:
    """The parameters of the checkpoint at `path`, or their average, as NumPy arrays; nothing else of it is read.

    This process alone. Raises: RunDirectoryError when they are not there or cannot be read.
    """
    try:
        with _alone() as checkpointer:
            item = {name: checkpointer.metadata(path).item_metadata.tree[name]}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            asked = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            return checkpointer.restore(path, args=asked)[name]
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged file
        raise RunDirectoryError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it") from error


def write_parameters(path: Path, params: Any) -> None:
    """Save parameters alone as an Orbax checkpoint (standard PyTree) at `path`. This process alone."""
    with _alone() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(params))


def _alone() -> ocp.Checkpointer:
    """A checkpointer with which this process acts without the others."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="verification"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _unreadable(path: Path) -> str | None:
    """Why Orbax cannot read every array of a checkpoint that has no manifest, or None. This process alone reads."""
    try:
        with _alone() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                return "it was never completed"
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged file
        return f"it was never completed: {type(error).__name__}"
    if not isinstance(tree, dict) or str(tree.get("step")) != path.name:
        return f"it holds step {tree.get('step') if isinstance(tree, dict) else None}"
    return None
