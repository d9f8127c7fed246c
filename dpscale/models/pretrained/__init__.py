"""Weights that somebody trained before: read from a file, renamed to a model's leaves, every tensor accounted for."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpscale.errors import InputError
from dpscale.models.leaves import as_tree, named
from dpscale.models.pretrained.files import Format as Format
from dpscale.models.pretrained.files import read_tensors
from dpscale.models.pretrained.match import fit
from dpscale.models.pretrained.names import rename


@dataclass(frozen=True)
class Origin:
    """Where initial weights come from; all of it may be published.

    `file`: the file's own name, without its folder. `sha256`: of its content (of all files, for a directory). `loaded`:
    leaves taken over. `adapted`, `initial`: leaves that were changed to fit, and that kept their random initial values,
    each with the reason. `unused`: tensors of the file that have no place in this model.
    """

    file: str
    format: str
    sha256: str
    loaded: tuple[str, ...] = ()
    adapted: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def statement(self) -> str:
        """One sentence for the privacy card: these weights count as public data."""
        return (
            f"The initial weights come from the file {self.file} ({self.format}, SHA-256 {self.sha256}). They count as "
            "public data: the guarantee does not cover what they were trained on."
        )

    def lines(self) -> list[str]:
        """What was done, for the owner: one line each."""
        lines = [f"weights   {len(self.loaded)} tensors from {self.file} ({self.format}, sha256 {self.sha256[:16]}..)"]
        lines += [f"weights   {name}: {what}" for name, what in (self.adapted | self.initial).items()]
        if self.unused:
            lines.append(f"weights   not used from the file: {', '.join(self.unused)}")
        return lines


def load_pretrained(params: Any, path: str | os.PathLike[str], format: Format = "auto") -> tuple[Any, Origin]:
    """`params` (nested dicts, as initialised) with the file's weights in their places, and where they come from.

    Formats are listed in docs/models.md; "auto" tells them apart by their tensors' names. A head (`head/..`) of another
    number of classes, or one that the file lacks, keeps its initial values; positions of a ViT are interpolated to
    another image size; those of a text model are cut to a shorter context; blocks go into a scanned stack.

    Raises: InputError where a leaf would stay without a value, a tensor is left over, or shapes differ: nothing is
        skipped in silence, except what is known to be for pre-training only, which `Origin.unused` names.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"model.pretrained={str(path)!r} does not exist: give a file, or a directory that holds one")
    tensors, found = read_tensors(path, format)
    converted = rename(tensors, found, path.name)
    result = fit(named(params), converted, path.name)
    origin = Origin(
        path.name, found, digest(path), result.loaded, result.adapted, result.initial, tuple(converted.unused)
    )
    return as_tree(result.leaves), origin


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory's files with their relative names in order; 64 hexadecimal digits."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
    return whole.hexdigest()
