"""Laws of the privacy card: what it must say, never say, and never round down."""

import json
import math

import pytest

from dpscale.privacy.card import Card, shown_epsilon
from dpscale.privacy.plan import PrivacyPlan

PLAN = {
    "num_examples": 5077,
    "sampling_rate": 0.02,
    "steps": 12,
    "expected_batch_size": 101.54,
    "noise_multiplier": 2.0,
    "clip_norm": 0.5,
    "delta": 1e-4,
    "epsilon_target": None,
}


def card(plan=None, **changes) -> Card:
    facts = {
        "plan": PrivacyPlan(**PLAN | (plan or {})),
        "released_step": 12,
        "charged_steps": 12,
        "covered_steps": 12,
        "finished": True,
        "insecure": False,
        "secret_destroyed": False,
        "public_data_used": "none",
        "hyperparameter_search": "none",
        "pretrained_weights": "none: random initial weights",
        "ledger": {"sha256": "ab", "lines": 3, "verification": "the chain is whole"},
        "program_digest": "cd",
        "versions": {"dpscale": "0.1.0", "dp-accounting": "0.6.0"},
    }
    return Card(**facts | changes)


def test_the_card_has_every_item_of_the_reporting_list():
    """arXiv 2303.00654, section 5.3.3, and PRIVACY.md's list."""
    values = card().to_json()
    items = {
        "setting": "central",
        "neighboring_relation": "zero_out",
        "unit": "example",
        "epsilon": PrivacyPlan(**PLAN).epsilon_after(12),
        "delta": 1e-4,
        "accountant": "pld",
        "hyperparameter_search": "none",
        "public_data_used": "none",
        "pretrained_weights": "none: random initial weights",
        "secret_destroyed": False,
    }
    assert {key: values[key] for key in items} == items
    assert values["ledger"]["sha256"] == "ab"
    assert values["versions"]["dpscale"] == "0.1.0"
    assert "every checkpoint" in values["covers"]
    assert "the weights after step 12 of 12" in values["released"]
    assert any("Poisson" in assumption for assumption in values["accountant_assumptions"])
    json.dumps(values, allow_nan=False)
    text = card().to_markdown()
    for part in (
        "central",
        "zero_out",
        "one example",
        "Poisson",
        "0.6.0",
        "SHA-256 `ab`",
        shown_epsilon(values["epsilon"]),
    ):
        assert part in text


@pytest.mark.parametrize("unit", ["example", "image", "patient"])
def test_the_unit_of_privacy_is_printed_and_so_is_what_several_records_of_one_person_mean(unit):
    """PRIVACY.md row 38."""
    made = card({"unit": unit})
    assert made.to_json()["unit"] == unit
    record = unit if unit == "example" else f"record (called '{unit}')"  # no promise to each patient
    assert f"for each {record} of the training data" in made.statement
    assert f"| one {record};" in made.to_markdown()
    assert "whoever has several is protected for each, not for all together" in made.to_markdown()


def test_user_level_privacy_is_printed_with_its_bound():
    made = card({"unit": "user", "max_examples_per_user": 7})
    assert made.to_json()["max_examples_per_user"] == 7
    assert "one user with all its records, of which at most 7 are used" in made.to_markdown()
    assert "for each user of the training data" in made.statement
    text = made.to_markdown()
    assert "not for all together" not in text
    for part in ("one user's records replaced", "of 5077 users", "each user's summed gradient", "* Each user entered"):
        assert part in text
    for part in ("one record", "each record", "Each record", "5077 records"):
        assert part not in text


def test_a_card_says_what_the_run_is_held_to_and_how_many_attempts_it_took():
    made = card(attempts=3, covered_steps=14)
    assert made.epsilon == made.plan.epsilon_after(14)
    for text in (made.to_markdown(), made.to_json()["holds"]):
        assert "never charged more than 14 steps" in text
    assert (made.to_json()["attempts"], made.to_json()["covered_steps"]) == (3, 14)
    assert "charged in 3 attempt(s)" in made.to_markdown()
    assert "never charged more" not in card(secret_destroyed=True).to_markdown()
    assert card(insecure=True).to_json()["holds"] is None


def test_repeated_steps_without_an_epsilon_that_limits_them_are_an_assumption_of_the_card():
    assumed = "was not decided by looking at results"
    assert assumed in card(attempts=2).to_markdown()
    assert assumed not in card().to_markdown()
    assert assumed not in card({"epsilon_target": 3.0}, attempts=2).to_markdown()


def test_the_card_says_whether_the_laws_were_checked_before_the_first_step():
    made = card(checked="23 laws held before the first step")
    assert made.to_json()["laws_checked"] == "23 laws held before the first step"
    assert "23 laws held before the first step" in made.to_markdown()


def test_public_data_and_the_search_are_printed_as_the_owner_stated_them():
    """PRIVACY.md row 40."""
    made = card(public_data_used="ImageNet-21k | weights", hyperparameter_search="private")
    assert made.to_json()["public_data_used"] == "ImageNet-21k | weights"
    text = made.to_markdown()
    assert "ImageNet-21k \\| weights" in text
    assert "NOT covered" in text


def test_a_run_that_was_stopped_gets_the_planned_ends_epsilon_and_the_other_is_labelled():
    """PRIVACY.md row 42 and rule 5."""
    made = card(finished=False, charged_steps=7, released_step=7)
    plan = made.plan
    assert made.epsilon == plan.epsilon_after(12)
    assert made.to_json()["epsilon_if_the_stop_was_decided_in_advance"] == plan.epsilon_after(7)
    assert "epsilon if the stop was decided in advance" in made.to_markdown()
    repeated = card(finished=False, charged_steps=15, covered_steps=15)
    assert repeated.epsilon == plan.epsilon_after(15)
    assert card(charged_steps=15).epsilon == plan.epsilon_after(15)


@pytest.mark.parametrize(
    ("changes", "plan", "why"),
    [
        ({"insecure": True}, {}, "fixed seed"),
        ({}, {"enabled": False}, "without privacy"),
        ({}, {"noise_multiplier": 0.0}, "too small"),
    ],
)
def test_where_nothing_is_promised_the_card_says_so_and_shows_no_epsilon(changes, plan, why):
    made = card(plan, **changes)
    values = made.to_json()
    assert (values["guarantee"], values["epsilon"], values["delta"]) == (False, None, None)
    assert made.statement.startswith("NO privacy guarantee")
    assert why in made.to_markdown()
    assert "-differential privacy for" not in made.to_markdown()


def test_where_the_number_of_records_is_private_nothing_on_the_card_gives_it_away():
    """PRIVACY.md row 4: neither N, nor q * N, nor a digest on which guesses of N can be tested."""
    made = card({"neighboring_relation": "add_or_remove"})
    text = json.dumps(made.to_json()) + made.to_markdown()
    for part in ("5077", "101.54", made.plan.digest()):
        assert part not in text
    assert made.to_json()["mechanism"]["num_examples_is_public"] is False
    assert card().to_json()["mechanism"]["num_examples"] == 5077


def test_truncated_sampling_is_on_the_card_and_in_its_epsilon():
    made = card({"max_batch_size": 120})
    assert made.to_json()["mechanism"]["max_batch_size"] == 120
    assert "truncated: draws above 120" in made.to_markdown()
    assert "truncated Poisson" in made.to_json()["accountant_assumptions"][0]
    assert "truncated" not in card().to_json()["accountant_assumptions"][0]
    assert made.epsilon > card().epsilon


def test_replace_one_is_accounted_and_named_as_such():
    """PRIVACY.md row 45: the relation drives the accountant."""
    made = card({"neighboring_relation": "replace_one"})
    assert made.epsilon > 1.5 * card().epsilon
    assert "one record replaced by any other" in made.to_markdown()


@pytest.mark.parametrize("destroyed", [True, False])
def test_the_card_says_whether_the_secret_was_destroyed(destroyed):
    """PRIVACY.md row 50."""
    made = card(secret_destroyed=destroyed)
    assert made.to_json()["secret_destroyed"] is destroyed
    assert ("was destroyed" if destroyed else "still exists") in made.to_markdown()


def test_epsilon_is_never_rounded_down():
    for value in (2.9999, 3.0, 3.00001, 0.1 + 0.2, 1e-9):
        assert float(shown_epsilon(value)) >= value - 1e-9
    assert shown_epsilon(2.9999) == shown_epsilon(3.0) == "3.000"
    assert shown_epsilon(3.00001) == "3.001"
    assert shown_epsilon(math.inf) == "infinite"
