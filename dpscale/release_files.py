"""The files of a release: their names, how they appear at once and whole, how they are read back. Imports no jax."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpscale.durable import sync_directory, write_atomically
from dpscale.errors import InputError
from dpscale.privacy.card import SCHEMA
from dpscale.weights import read_weights

WEIGHTS, ORBAX, MODEL, CARD, TEXT = "weights.safetensors", "orbax", "model.json", "privacy.json", "PRIVACY.md"
SHARED_MODE = 0o644


class Release(NamedTuple):
    """`params`: nested dicts of NumPy arrays; `model`: what model.json holds; `card`: what privacy.json holds."""

    params: dict[str, Any]
    model: dict[str, Any]
    card: dict[str, Any]


def load_release(directory: str | os.PathLike[str]) -> Release:
    """Read back what `release` wrote; needs NumPy only.

    `params` suits `dpscale.models.build_model(model["name"], model["num_classes"], **model["options"])` where
    model["source"] is "dpscale.models".

    Raises: InputError where a file, of orbax/ too, is missing, is not the one that the card lists, or is not listed.
    """
    directory = Path(directory).expanduser()
    card = _read_json(directory / CARD)
    if card.get("schema") != SCHEMA or not isinstance(card.get("files"), dict):
        raise InputError(f"{directory / CARD} is no card of schema {SCHEMA}: use the dpscale that wrote it")
    listed, there = card["files"], {name: digest for name, digest in digests(directory).items() if name != CARD}
    for name in sorted({WEIGHTS, MODEL, TEXT} | listed.keys() | there.keys()):
        if name not in listed:
            raise InputError(f"{directory / name} is not listed in {CARD}, so it is no part of the release: remove it")
        if there.get(name) != listed[name]:
            raise InputError(f"{directory / name} is not the file that {CARD} lists: copy the release again")
    return Release(read_weights(directory / WEIGHTS), _read_json(directory / MODEL), card)


def refuse_occupied(out: Path) -> None:
    """Raises: InputError unless `out` can become a release."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory: a release goes into a new one")


@contextlib.contextmanager
def appearing_at_once(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when all went well and is removed otherwise.

    Others cannot look into it before; what a killed release left is removed.
    """
    stage = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
        stage.mkdir()
        mode = stage.stat().st_mode & 0o777  # what the user's umask gives
        stage.chmod(0o700)
        yield stage
        _sync(stage)
        stage.chmod(mode)
        os.rename(stage, out)
        sync_directory(out.parent)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}): free space, repair access, or choose another") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Put every file and directory below `directory` on disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory`, by its path from there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that others may read."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n", SHARED_MODE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}): give a directory that `dpscale release` wrote"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object: give a directory that `dpscale release` wrote")
    return values
