"""What the runs of one search on the same data have spent together: `dpscale privacy sweep`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpscale.errors import DpscaleError, InputError
from dpscale.privacy.accounting import Accountant
from dpscale.privacy.composition import composed_epsilon
from dpscale.privacy.shown import shown_epsilon
from dpscale.run_record import RunRecord, read_run


@dataclass(frozen=True)
class SearchCost:
    """epsilon at `delta` of all runs together. `planned`: with every run at what a release of it would cover.

    `sameness`: how it is known, or that it is assumed, that the data are the same.
    """

    records: list[RunRecord]
    delta: float
    accountant: Accountant
    planned: float
    charged: float
    sameness: str


def search_cost(
    runs: Sequence[str | os.PathLike[str]],
    *,
    delta: float | None = None,
    accountant: Accountant = "pld",
    assume_same_data: bool = False,
) -> SearchCost:
    """Compose `runs`, which need not have the same plan.

    Args:
        delta: of the sum; None: the runs' own, where all have the same.
        assume_same_data: compose although it cannot be shown that the runs' data are the same. The result is an upper
            bound also for data sets that overlap in part.

    Raises: InputError for a run that promises nothing, is there twice, protects users where others protect records, or
        whose data may be others; RunDirectoryError and PrivacyError for damaged runs.
    """
    records = [read_run(run) for run in runs]
    if not records:
        raise InputError("no run is given: name the run directories of one search")
    _refuse_doubles(records)
    for record in records:
        if not record.plan.enabled or record.is_insecure:
            why = "privacy.enabled = false" if not record.plan.enabled else "privacy.insecure_seed is set"
            raise InputError(
                f"{record.directory.root} promises nothing ({why}), so neither does the search: leave it out"
            )
    _refuse_mixed_units(records)
    deltas = sorted({record.plan.delta for record in records if record.plan.delta is not None})
    if delta is None and len(deltas) > 1:
        raise InputError(f"the runs have different deltas ({', '.join(map(str, deltas))}): choose one with --delta")
    chosen = deltas[0] if delta is None else delta
    sameness = _sameness(records, assume_same_data)
    charged = [(record.plan.accounted_step, record.charged_steps) for record in records]
    planned = [(record.plan.accounted_step, record.covered_steps) for record in records]
    at_end, now = (composed_epsilon(parts, chosen, accountant) for parts in (planned, charged))
    return SearchCost(records, chosen, accountant, at_end, now, sameness)


def search_lines(cost: SearchCost) -> Iterator[str]:
    """Yield what `dpscale privacy sweep` prints, line by line."""
    for record in cost.records:
        plan = record.plan
        steps = record.covered_steps
        state = "finished" if record.is_finished else f"{record.charged_steps} charged so far"
        yield (
            f"run      {record.directory.root}: {steps} steps ({state}), q {plan.sampling_rate:.6g}, noise multiplier "
            f"{plan.noise_multiplier:.4f}, unit {plan.unit}"
        )
    yield f"data     {cost.sameness}"
    together = f"for all {len(cost.records)} runs ({cost.accountant})"
    yield f"epsilon  {shown_epsilon(cost.planned)} at delta {cost.delta:g} {together}"
    if cost.charged != cost.planned:
        yield f"         {shown_epsilon(cost.charged)} if every stop was decided in advance"
    yield "assumes  that q, noise and steps of each run were fixed before results of the others were seen; learning"
    yield "         rates, models and the choice of the run to publish may have followed from them"


def _refuse_doubles(records: Sequence[RunRecord]) -> None:
    seen: dict[str, RunRecord] = {}
    for record in records:
        place = os.path.realpath(record.directory.root)
        if place in seen:
            raise InputError(f"{record.directory.root} is given twice: name each run once")
        seen[place] = record


def _refuse_mixed_units(records: Sequence[RunRecord]) -> None:
    """One epsilon cannot hold for users and for single records at once, whatever the data are."""
    users = [record for record in records if record.plan.unit == "user"]
    if users and len(users) < len(records):
        other = next(record for record in records if record.plan.unit != "user")
        raise InputError(
            f'{users[0].directory.root} protects users (privacy.unit = "user") and {other.directory.root} single '
            f"records (privacy.unit = {other.plan.unit!r}): no one epsilon holds for both. Compose the runs of each "
            "kind on their own"
        )


def _sameness(records: Sequence[RunRecord], assumed: bool) -> str:
    """How it is known that the runs share their data; fingerprints are keyed, so the data themselves are needed."""
    if len(records) == 1:
        return "one run"
    try:
        fingerprint = _fingerprint(records[0])
        others = [r for r in records if r.secret is None or not _has_data(r, fingerprint)]
        if not others:
            return "the same in all runs: their keyed fingerprints are those of the data that the first run names"
        why = f"the data that {records[0].directory.root} names now are not those of {others[0].directory.root}"
        if others[0].secret is None:
            why = f"{others[0].directory.root} has no secret any more, so its keyed fingerprint cannot be checked"
    except DpscaleError as error:
        why = f"the data cannot be read to check the runs' keyed fingerprints ({error})"
    if assumed:
        return f"ASSUMED to be the same, as you said: {why}"
    raise InputError(
        f"it cannot be shown that the runs used the same data: {why}. Make the data available at the path in its "
        "config; or say --assume-same-data: the result is then an upper bound also where data sets overlap in part"
    )


def _fingerprint(record: RunRecord) -> bytes:
    from dpscale.data.open import open_source
    from dpscale.data.options import SourceOptions
    from dpscale.data.users import by_user

    data = record.config.data
    if not data.train:
        raise InputError("its data came from Python")
    return by_user(record.config, open_source(data.train, SourceOptions.from_config(data))).fingerprint_parts()


def _has_data(record: RunRecord, fingerprint: bytes) -> bool:
    assert record.secret is not None
    return record.identity["data"] == record.secret.mac("fingerprint", fingerprint)
