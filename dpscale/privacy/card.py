"""The privacy card: what is promised about a released model, to whom, and under which assumptions.

Its items are those that Ponomareva et al. 2023 (arXiv 2303.00654, section 5.3.3) ask of a report. Pure: facts come in,
JSON and Markdown go out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.shown import shown_epsilon

SCHEMA = 1
RECORD_RELATIONS = {
    "zero_out": "one record replaced by one that contributes nothing; the number of records is public",
    "add_or_remove": "one record added or removed",
    "replace_one": "one record replaced by any other",
}
USER_RELATIONS = {
    "zero_out": "one user's records replaced by none that contribute; the number of users is public",
    "add_or_remove": "one user's records added or removed",
    "replace_one": "one user's records replaced by any others",
}
USER = "user"  # the one unit that groups records
SEARCHES = {
    "none": "none: the settings were fixed without looking at results",
    "public": "on public data only: it costs no privacy",
    "private": "on private data: it is NOT covered by this epsilon; all its runs together spend more",
}
ACCOUNTANTS = {
    "pld": "privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), an upper bound",
    "rdp": "Renyi differential privacy (Mironov et al. 2019), an upper bound",
}


def unit_words(unit: str, most: int | None) -> str:
    """Who or what is protected, in words; only "user" groups records, at most `most` of each being used."""
    if unit == USER:
        return f"one user with all its records, of which at most {most} are used"
    return f"one {unit_name(unit)}; whoever has several is protected for each, not for all together"


def unit_name(unit: str) -> str:
    """Any other word than "user" and "example" is what the owner calls one record, and may promise too much."""
    return unit if unit in (USER, "example") else f"record (called '{unit}')"


def relation_words(relation: str, unit: str) -> str:
    """Which data sets are neighbours, in words."""
    return (USER_RELATIONS if unit == USER else RECORD_RELATIONS)[relation]


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of one release.

    `charged_steps`: what the ledger charges now; `covered_steps`: what the run can be charged until its end, from
    which epsilon is computed, and which the ledger holds it to. `finished`: whether it came to its planned end.
    `averaged`: the moving average of the weights is released. `public_results`: held-out metrics on data that were
    declared public. `attempts`: how many the run took, each charged. `made_from_size`: what of the plan was made from
    the number of records. `checked`: whether the laws were checked on the run's processes, as a sentence. `files`:
    SHA-256 of what is released, by name.
    """

    plan: PrivacyPlan
    released_step: int
    charged_steps: int
    covered_steps: int
    finished: bool
    insecure: bool
    secret_destroyed: bool
    averaged: bool = False
    attempts: int = 1
    made_from_size: tuple[str, ...] = ("the divisor",)
    public_data_used: str | None
    hyperparameter_search: str | None
    pretrained_weights: str
    ledger: Mapping[str, Any]
    program_digest: str
    versions: Mapping[str, str]
    checked: str = "not known"
    public_results: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def why_no_guarantee(self) -> str | None:
        """The reason where nothing is promised, else None."""
        if not self.plan.enabled:
            return "it was trained without privacy (privacy.enabled = false)"
        if self.insecure:
            return (
                "its noise came from a fixed seed (privacy.insecure_seed), so anyone can make it again and subtract it"
            )
        if not math.isfinite(self.epsilon):
            return "its noise is too small for any finite epsilon"
        return None

    @property
    def epsilon(self) -> float:
        """What holds for this release: of all steps that the run was, and can still be, charged."""
        return self.plan.epsilon_after(max(self.charged_steps, self.covered_steps))

    @property
    def statement(self) -> str:
        """The guarantee, or its absence, in one sentence."""
        why = self.why_no_guarantee
        if why is not None:
            return f"NO privacy guarantee: {why}."
        return (
            f"({shown_epsilon(self.epsilon)}, {self.plan.delta:g})-differential privacy for each "
            f"{unit_name(self.plan.unit)} of the training data, in the central setting."
        )

    def to_json(self) -> dict[str, Any]:
        """What privacy.json holds; epsilon is null where nothing is promised."""
        plan, promised = self.plan, self.why_no_guarantee is None
        return {
            "schema": SCHEMA,
            "statement": self.statement,
            "guarantee": promised,
            "epsilon": self.epsilon if promised else None,
            "delta": plan.delta if promised else None,
            "epsilon_if_the_stop_was_decided_in_advance": (
                plan.epsilon_after(self.charged_steps) if promised and self._covers_more else None
            ),
            "setting": "central",
            "neighboring_relation": plan.neighboring_relation,
            "unit": plan.unit,
            "max_examples_per_user": plan.max_examples_per_user,
            "released": self._released(),
            "covers": self._covers(),
            "finished": self.finished,
            "released_step": self.released_step,
            "planned_steps": plan.steps,
            "charged_steps": self.charged_steps,
            "covered_steps": self.covered_steps,
            "attempts": self.attempts,
            "holds": self._holds(),
            "mechanism": self._mechanism(),
            "accountant": plan.accountant,
            "accountant_library": "dp-accounting",
            "accountant_assumptions": self._assumptions(),
            "laws_checked": self.checked,
            "hyperparameter_search": self.hyperparameter_search,
            "public_data_used": self.public_data_used,
            "pretrained_weights": self.pretrained_weights,
            "public_results": dict(self.public_results),
            "secret": self._secret(),
            "secret_destroyed": self.secret_destroyed,
            "ledger": dict(self.ledger),
            "plan_digest": self._plan_digest(),
            "program_digest": self.program_digest,
            "versions": dict(self.versions),
            "files": dict(self.files),
        }

    def to_markdown(self) -> str:
        """What PRIVACY.md holds."""
        plan, relation = self.plan, self.plan.neighboring_relation
        rows = [
            ("Setting", "central: whoever trained saw the data; the promise is to everyone else"),
            ("Neighbouring data sets", f"{relation}: {relation_words(relation, plan.unit)}"),
            ("Unit of privacy", unit_words(plan.unit, plan.max_examples_per_user)),
            ("Released", self._released()),
            ("Covered", self._covers()),
            *self._epsilon_rows(),
            *([("Holds", self._holds() or "")] if self._holds() else []),
            ("Accountant", f"{plan.accountant}: {ACCOUNTANTS[plan.accountant]}, by dp-accounting"),
            ("Sampling", self._sampling()),
            ("Clipping and noise", self._noise()),
            (
                "Steps",
                f"{self.charged_steps} charged in {self.attempts} attempt(s), repeated ones included; {plan.steps} "
                f"planned; epsilon covers {self.covered_steps}",
            ),
            ("Laws checked on the run's own processes", self.checked),
            ("Search for hyper-parameters", SEARCHES.get(self.hyperparameter_search or "", "not stated")),
            ("Public data used", self.public_data_used or "not stated"),
            ("Pre-trained weights", self.pretrained_weights),
            ("Secret", self._secret()),
            (
                "Ledger",
                f"{self.ledger['lines']} lines, SHA-256 `{self.ledger['sha256']}`: {self.ledger['verification']}",
            ),
            ("Plan, program", f"SHA-256 `{self._plan_digest()}`, `{self.program_digest}`"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        if self.public_results:
            results = ", ".join(f"{name} {value:g}" for name, value in self.public_results.items())
            rows.append(("Results on public data", results))
        lines = ["# Privacy of this model", "", f"**{_escape(self.statement)}**", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {_escape(text)} |" for name, text in rows]
        lines += ["", "## What the numbers assume", ""]
        lines += [f"* {assumption}" for assumption in self._assumptions()]
        lines += ["", "## Files", "", "| file | SHA-256 |", "| --- | --- |"]
        lines += [f"| {name} | `{digest}` |" for name, digest in self.files.items() if "/" not in name]
        return "\n".join(lines) + "\n"

    @property
    def _size_is_public(self) -> bool:
        return self.plan.neighboring_relation != "add_or_remove"

    def _plan_digest(self) -> str | None:
        """Without the size in it, every guess of the size could be tested on the digest."""
        return self.plan.digest() if self._size_is_public else None

    def _epsilon_rows(self) -> list[tuple[str, str]]:
        if self.why_no_guarantee is not None:
            return [("epsilon, delta", "none")]
        rows = [("epsilon, delta", f"{shown_epsilon(self.epsilon)} at delta {self.plan.delta:g}")]
        if self._covers_more:
            early = shown_epsilon(self.plan.epsilon_after(self.charged_steps))
            rows.append(("epsilon if the stop was decided in advance", f"{early} at delta {self.plan.delta:g}"))
        return rows

    @property
    def _by_user(self) -> bool:
        return self.plan.unit == USER

    @property
    def _covers_more(self) -> bool:
        return self.covered_steps > self.charged_steps

    def _released(self) -> str:
        if self.finished:
            how = "the run came to its planned end"
        else:
            how = "the run did not come to its planned end, so the epsilon of all that it may still run holds"
        what = "the moving average of the weights" if self.averaged else "the weights"
        return f"{what} after step {self.released_step} of {self.plan.steps} planned; {how}"

    def _covers(self) -> str:
        return "these weights, every checkpoint of the run, its public metrics, and the choice among them"

    def _holds(self) -> str | None:
        """Why it stays true; None where nothing is promised."""
        if self.why_no_guarantee is not None:
            return None
        if self.secret_destroyed:
            return "for good: the run has ended"
        return (
            f"for good: the ledger notes this release, and the run is never charged more than {self.covered_steps} "
            "steps. A copy of its directory made before, or an older state of it, does not know of this"
        )

    def _sampling(self) -> str:
        plan = self.plan
        text = f"Poisson, rate {plan.sampling_rate:.8g}"
        if self._size_is_public:
            text += f" of {plan.num_examples} {'users' if self._by_user else 'records'}"
        if plan.max_batch_size is not None:
            text += f", truncated: draws above {plan.max_batch_size} are cut to a uniform subset, and accounted so"
        return text

    def _noise(self) -> str:
        plan = self.plan
        if not plan.enabled:
            return "none"
        whose = "each user's summed gradient" if self._by_user else "each record's gradient"
        bound = f"{whose} to norm {plan.clip_norm:g} ({plan.bound})"
        return f"{bound}; noise multiplier {plan.noise_multiplier:.8g}"

    def _mechanism(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "sampling": "poisson" if plan.max_batch_size is None else "truncated poisson",
            "sampling_rate": plan.sampling_rate,
            "max_batch_size": plan.max_batch_size,
            "num_examples": plan.num_examples if self._size_is_public else None,
            "num_examples_is_public": self._size_is_public,
            "expected_batch_size": plan.expected_batch_size if self._size_is_public else None,
            "clip_norm": plan.clip_norm,
            "bound": plan.bound,
            "clip_groups": None if plan.clip_groups is None else dict(plan.clip_groups),
            "noise_multiplier": plan.noise_multiplier,
        }

    def _assumptions(self) -> list[str]:
        one, poisson = "user" if self._by_user else "record", "(Poisson sampling)"
        if self.plan.max_batch_size is not None:
            poisson = "before draws above the largest batch were cut (truncated Poisson sampling)"
        found = [
            f"Each {one} entered each step independently with the stated probability {poisson}.",
            "epsilon is an upper bound for real numbers; floating-point numbers behave as those do.",
            "Nothing else computed from the training data was published: no training loss, batch size or step time.",
        ]
        if self.plan.neighboring_relation == "add_or_remove":
            made = ", ".join(self.made_from_size)
            text = f"Made from the private number of {one}s: {made}; the guarantee holds for this plan as given."
            if "the sampling rate" in self.made_from_size:
                text += f" Whoever knows the expected batch size can compute the number of {one}s from the rate."
            found.append(text)
        if self.attempts > 1 and self.plan.epsilon_target is None:
            found.append(
                "That steps were repeated in a new attempt was not decided by looking at results: no epsilon was set "
                "that would have limited how many."
            )
        if self.plan.max_batch_size is not None:
            found.append("Larger draws were cut to a uniform subset; the accountant's analysis is arXiv 2508.15089.")
        return found

    def _secret(self) -> str:
        if self.insecure:
            return "none: a fixed seed"
        if self.secret_destroyed:
            return "the run's secret was destroyed, and the run ended for good"
        return "the run's secret still exists with the run's owner; with it the noise of these weights could be undone"


def _escape(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
