"""A point of a scaling sweep: how many devices, which logical batch, private or not, which repeat. Imports no jax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dpscale.errors import InputError

Mode = Literal["strong", "weak"]
Variant = Literal["private", "nonprivate"]
MODES: tuple[Mode, ...] = get_args(Mode)
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Setting:
    """What one job measures: all variants in turn on the same devices.

    `modes`: "strong" (the config's logical batch), "weak" (the batch grows with the devices), or both, where they
    coincide. `batch`: the expected logical batch of this setting.
    """

    devices: int
    batch: float
    modes: tuple[Mode, ...]
    repeat: int

    @property
    def name(self) -> str:
        """Names the job's directory and begins the names of its records."""
        batch = f"{self.batch:.3f}".rstrip("0").rstrip(".")
        return f"n{self.devices}-b{batch}-r{self.repeat}"

    def record_name(self, variant: Variant) -> str:
        """File name of the record of one variant."""
        return f"{self.name}-{variant}.json"


def settings(devices: Sequence[int], modes: Sequence[Mode], batch: float, repeats: int) -> list[Setting]:
    """Every setting of a sweep. The smallest count is the base: there the logical batch is `batch` in both modes.

    Raises: InputError for no count, or one given twice.
    """
    if not devices or len(set(devices)) < len(devices) or min(devices) < 1:
        raise InputError(f"--gpus {','.join(map(str, devices))}: give each number of devices once, all at least 1")
    found: dict[tuple[int, float], tuple[Mode, ...]] = {}
    base = min(devices)
    for count in sorted(devices):
        for mode in modes:
            own = batch if mode == "strong" else batch * count / base
            found[count, own] = (*found.get((count, own), ()), mode)
    return [
        Setting(count, own, chosen, repeat)
        for (count, own), chosen in found.items()
        for repeat in range(1, repeats + 1)
    ]


def parse_counts(text: str) -> list[int]:
    """ "1,2,4" as numbers, "8..1024" as the doublings in between, the end included; both can be mixed.

    Raises: InputError for anything else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", part)
        if match is None or int(match[1]) < 1:
            raise InputError(f"{text!r}: write numbers of devices, 1,2,4, or doublings, 8..1024")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{text!r}: {part.strip()} runs backwards; write the smaller number first")
        while first < last:
            counts.append(first)
            first *= 2
        counts.append(last)
    return sorted(set(counts))


def parse_names(text: str, valid: Sequence[str], option: str) -> tuple:
    """Names between commas, each one of `valid`, once.

    Raises: InputError for another name.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    wrong = [name for name in names if name not in valid]
    if wrong:
        raise InputError(f"{option} {text}: {', '.join(wrong)} is none of {', '.join(valid)}")
    return names
