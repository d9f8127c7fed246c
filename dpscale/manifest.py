"""The manifest of a checkpoint: what it holds, by size and digest, and what the run was at. Imports no jax.

A checkpoint counts as durable, for the ledger and for whatever leaves the run, only when its manifest is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dpscale.durable import sync_directory, write_atomically
from dpscale.errors import RunDirectoryError

SCHEMA = 1
MANIFEST = "manifest.json"


class Found(NamedTuple):
    """A whole checkpoint. `facts`: its manifest's; {} where the process died before writing one."""

    step: int
    facts: dict[str, Any]

    @property
    def attempt(self) -> int | None:
        """The attempt that saved it; None without a manifest."""
        return self.facts.get("attempt")


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a sub-directory of `directory`, whole or not, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def write_manifest(path: Path, step: int, facts: dict[str, Any]) -> None:
    """Put all of a checkpoint on disk (Orbax leaves that to the system), then the manifest that says so."""
    files = {}
    for file in _files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            size, digest = os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
        files[str(file.relative_to(path))] = [size, digest]
    for directory in {file.parent for file in _files(path)}:
        sync_directory(directory)
    manifest = {"schema": SCHEMA, "step": step, "facts": facts, "files": files}
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    sync_directory(path.parent)


def read_manifest(path: Path) -> tuple[str | None, Found, dict[str, Any]]:
    """(what is wrong with the manifest of the checkpoint at `path`, or None; step and facts; [size, digest] by file).

    Raises: RunDirectoryError when a newer dpscale wrote it.
    """
    nothing = Found(-1, {})
    file = path / MANIFEST
    if not file.exists():
        return "it has no manifest", nothing, {}
    try:
        manifest = json.loads(file.read_bytes())
        schema, step = manifest["schema"], manifest["step"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        facts = dict(manifest["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read: {error}", nothing, {}
    if schema != SCHEMA:
        raise RunDirectoryError(f"{file} has schema {schema}, this dpscale reads {SCHEMA}: use the newer one")
    if str(step) != path.name:
        return f"its manifest says step {step}", nothing, {}
    return None, Found(int(path.name), facts), files


def inspect(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with the checkpoint at `path`, or None; its manifest's facts). Reads every byte of it."""
    fault, found, files = read_manifest(path)
    if fault is not None:
        return fault, {}
    unlisted = {str(file.relative_to(path)) for file in _files(path) if not file.name.startswith(".")} - files.keys()
    if unlisted:
        return f"its manifest does not list {min(unlisted)}", {}
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}", {}
        if _file_digest(file) != digest:
            return f"{name} has other content than was written", {}
    return None, found.facts


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
