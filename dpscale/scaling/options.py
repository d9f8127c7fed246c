"""How one point is to be measured, as words that go through a job's script to its tasks. Imports no jax."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dpscale.scaling.point import Setting, Variant


@dataclass(frozen=True)
class Effort:
    """How long to look: `windows` windows of `steps` logical steps of each variant, in turn; and one checkpoint."""

    windows: int = 5
    steps: int = 8
    checkpoint: bool = True


@dataclass(frozen=True)
class MeasureOptions:
    """The same for every process of a job.

    `sweep`: the sweep's directory; `cores`: CPU cores that each process keeps to, 0: whatever it is given;
    `setting.devices` 0: those that are there, with the batch of `base` devices.
    """

    sweep: str
    setting: Setting
    variants: tuple[Variant, ...]
    effort: Effort = Effort()
    cores: int = 0
    base: int = 1
    declared_public: bool = False

    def words(self) -> tuple[str, ...]:
        """One "name=JSON" for each field."""
        return tuple(f"{name}={json.dumps(value)}" for name, value in asdict(self).items())

    @classmethod
    def parse(cls, words: Sequence[str]) -> MeasureOptions:
        """The inverse of `words`."""
        values = {name: json.loads(text) for name, _, text in (word.partition("=") for word in words)}
        setting = Setting(**{**values["setting"], "modes": tuple(values["setting"]["modes"])})
        read = {"setting": setting, "variants": tuple(values["variants"]), "effort": Effort(**values["effort"])}
        return cls(**{**values, **read})
