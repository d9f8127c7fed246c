"""From what a user asks to a prediction: records or named assumptions, a network profile, the counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpscale.errors import InputError
from dpscale.scaling.curves import Curves, curves, unlike
from dpscale.scaling.network import load_network
from dpscale.scaling.point import Mode, Variant
from dpscale.scaling.predict import Prediction, predict
from dpscale.scaling.sweep import collect
from dpscale.scaling.workload import Assumed, Workload, assumed_workloads, measured_workloads

DEFAULT_PHYSICAL = 64
IMAGENET_EXAMPLES = 1_281_167


@dataclass(frozen=True)
class Asked:
    """The options of `dpscale scaling predict`; None where the records say it."""

    counts: tuple[int, ...]
    modes: tuple[Mode, ...]
    network: str
    batch: float | None = None
    physical_batch_size: int | None = None
    examples_per_s: float | None = None
    private_ratio: float = 1.10
    num_parameters: int | None = None
    num_examples: int | None = None
    assumption: str = "no source given"
    update_sharding: Literal["replicated", "sharded"] | None = None


def forecast(source: Path | None, asked: Asked) -> tuple[Prediction, Curves | None]:
    """The prediction, and the measured curves that stand beside it.

    Raises: InputError where neither records nor a whole set of assumptions are given, or both.
    """
    network = load_network(asked.network)
    if (source is None) == (asked.examples_per_s is None):
        seen = "neither is" if source is None else "both are"
        raise InputError(
            f"a sweep (or record) or --examples-per-second: {seen} given; a prediction starts from measured times, or "
            "from a stated assumption"
        )
    if source is None:
        assumed = assumed_workloads(_assumed(asked), network)
        chosen: dict[Variant, Workload] = {
            name: replace(one, sharded=asked.update_sharding == "sharded") for name, one in assumed.items()
        }
        return predict(chosen, network, asked.counts, asked.modes), None
    collected = collect(source)
    workloads = measured_workloads(collected.records)
    changes: dict[str, Any] = {"batch": asked.batch, "physical_batch_size": asked.physical_batch_size}
    changes["num_examples"] = asked.num_examples
    changes["sharded"] = None if asked.update_sharding is None else asked.update_sharding == "sharded"
    changes = {name: value for name, value in changes.items() if value is not None}
    adapted: dict[Variant, Workload] = {variant: replace(one, **changes) for variant, one in workloads.items()}
    for workload in adapted.values():
        _check(workload.batch, workload.num_examples)
    found, mixed = predict(adapted, network, asked.counts, asked.modes, collected.records), unlike(collected.records)
    return (replace(found, sources=(*found.sources, mixed)) if mixed else found), curves(collected)


def _assumed(asked: Asked) -> Assumed:
    if asked.num_parameters is None or asked.batch is None or asked.examples_per_s is None:
        raise InputError("--examples-per-second needs --parameters and --batch-size: there is no record that says them")
    if not asked.examples_per_s > 0 or not asked.private_ratio > 0:
        raise InputError(
            f"--examples-per-second {asked.examples_per_s:g}, --private-ratio {asked.private_ratio:g}: give numbers "
            "above 0"
        )
    examples = asked.num_examples or IMAGENET_EXAMPLES
    _check(asked.batch, examples)
    return Assumed(
        examples_per_s=asked.examples_per_s,
        num_parameters=asked.num_parameters,
        batch=asked.batch,
        num_examples=examples,
        physical_batch_size=asked.physical_batch_size or DEFAULT_PHYSICAL,
        private_ratio=asked.private_ratio,
        source=asked.assumption,
    )


def _check(batch: float, num_examples: int) -> None:
    if not 0 < batch <= num_examples:
        raise InputError(f"logical batch {batch:g} of {num_examples} examples: give one above 0 and at most that many")
