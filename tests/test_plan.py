import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dpscale.config import config_from_dict
from dpscale.errors import InputError, RunDirectoryError
from dpscale.privacy import accounting
from dpscale.privacy.plan import ADDED, PrivacyPlan
from dpscale.privacy.sensitivity import SLACK


def config(training=None, performance=None, **privacy):
    values = {"noise_multiplier": 1.5, "delta": 1e-5, "expected_batch_size": 100, "clip_norm": 0.5, **privacy}
    values = {key: value for key, value in values.items() if value is not None}
    return config_from_dict(
        {"training": training or {"steps": 20}, "privacy": values, "performance": performance or {}}
    )


def plan(num_examples=1000, **privacy):
    return PrivacyPlan.from_config(config(**privacy), num_examples=num_examples)


def calibrated(**privacy):
    return config(noise_multiplier=None, **{"epsilon": 2.0, **privacy})


def test_rate_divisor_and_noise_come_from_one_place():
    made = plan()
    assert made.sampling_rate == 100 / 1000
    assert made.expected_batch_size == 100
    assert made.noise_stddev == 1.5 * 0.5 * (1 + SLACK)
    by_rate = plan(expected_batch_size=None, sampling_rate=0.1)
    assert by_rate == made


def test_divisor_noise_steps_and_rate_of_a_plan_know_nothing_of_a_record_that_left():
    # Row 4: a plan is made once; what the step reads from it are its fields, whatever the data set's size is now.
    made = PrivacyPlan.from_config(config(training={"epochs": 3.0}), num_examples=1000)
    again = PrivacyPlan.from_json(made.to_json())
    for name in ("expected_batch_size", "noise_stddev", "steps", "sampling_rate"):
        assert getattr(again, name) == getattr(made, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_examples = 999


def test_epsilon_is_the_same_for_any_physical_batch():
    # Row 41.
    plans = {
        PrivacyPlan.from_config(config(performance={"physical_batch_size": size}), num_examples=1000).digest()
        for size in (1, 7, 64)
    }
    assert len(plans) == 1


def test_the_replace_one_factor_is_in_the_accountant_and_not_in_the_noise_as_well():
    # Row 45: with no sampling, replacing at noise 2 sigma costs what zeroing out costs at sigma.
    zeroed = plan(expected_batch_size=1000, noise_multiplier=5.0)
    replaced = plan(expected_batch_size=1000, noise_multiplier=10.0, neighboring_relation="replace_one")
    assert replaced.epsilon_after(20) == pytest.approx(zeroed.epsilon_after(20), rel=1e-3)
    assert replaced.noise_stddev == 2 * zeroed.noise_stddev


def test_calibration_keeps_within_epsilon_and_epsilon_follows_the_steps_that_ran():
    made = PrivacyPlan.from_config(calibrated(), num_examples=1000)
    assert 1.999 < made.epsilon_after(made.steps) <= 2.0
    # Row 42: a stop at 7 of 20 is reported as 7; a replay of 5 as 25.
    curve = made.epsilon_curve([0, 7, 20, 25])
    assert curve[0] == 0
    assert curve == sorted(set(curve))
    assert curve[1] == accounting.epsilon(
        noise_multiplier=made.noise_multiplier, sampling_rate=0.1, steps=7, delta=1e-5
    )
    assert curve[3] > 2.0


def test_reserved_steps_are_paid_for_by_the_noise_and_keep_to_the_allowed_epsilon():
    plain = PrivacyPlan.from_config(calibrated(), num_examples=1000)
    made = PrivacyPlan.from_config(calibrated(replay_reserve=5), num_examples=1000)
    longer = PrivacyPlan.from_config(
        config(training={"steps": 25}, noise_multiplier=None, epsilon=2.0), num_examples=1000
    )
    assert (made.steps, made.chargeable_steps) == (20, 25)
    assert made.noise_multiplier == longer.noise_multiplier > plain.noise_multiplier
    assert 1.999 < made.epsilon_after(25) <= 2.0 < made.epsilon_after(26)
    assert PrivacyPlan.from_config(calibrated(replay_reserve=5), num_examples=1000, cached=plain) == made


def test_a_reserve_without_an_allowed_epsilon_is_refused():
    with pytest.raises(InputError, match=r"replay_reserve=5 is given but privacy.epsilon is not.*Give privacy.epsilon"):
        config(replay_reserve=5)


def test_a_constant_number_of_accumulations_needs_a_cap_and_the_refusal_names_one_that_is_nearly_free():
    with pytest.raises(InputError, match=r"needs a largest batch. Set privacy.max_batch_size=143 \(4.5 standard"):
        plan(constant_time=True)
    capped = plan(constant_time=True, max_batch_size=143)
    assert capped.epsilon_after(20) == pytest.approx(plan().epsilon_after(20), rel=2e-3)
    assert capped == plan(max_batch_size=143), "it changes no promise, so it may be switched on and off"


def test_truncation_is_accounted_as_truncation():
    capped = plan(max_batch_size=101)
    assert capped.epsilon_after(20) > plan().epsilon_after(20) * 1.01
    assert capped.dp_event(20).event.truncated_batch_size == 101


def test_the_dp_event_has_the_plans_numbers():
    event = plan().dp_event(7)
    assert event.count == 7
    assert event.event.sampling_probability == 0.1
    assert event.event.event.noise_multiplier == 1.5


@pytest.mark.parametrize(
    ("epochs", "batch", "expected"), [(3.0, 100, 30), (1.0, 300, 4), (9.0, 9, 1000), (0.001, 100, 1), (0.3, 100, 3)]
)
def test_steps_are_epochs_over_the_rate_rounded_up_once(epochs, batch, expected):
    made = PrivacyPlan.from_config(config(training={"epochs": epochs}, expected_batch_size=batch), num_examples=1000)
    assert made.steps == expected


def test_without_privacy_the_sampler_is_the_same_and_nothing_is_promised():
    private, public = plan(), plan(enabled=False)
    for name in ("sampling_rate", "steps", "expected_batch_size", "num_examples", "max_batch_size"):
        assert getattr(public, name) == getattr(private, name)
    assert public.clip_norm is None
    assert public.noise_stddev == 0
    assert public.epsilon_after(1) == math.inf
    assert public.epsilon_after(0) == 0
    assert type(public.dp_event(3)).__name__ == "NonPrivateDpEvent"
    assert PrivacyPlan.from_json(public.to_json()) == public


def test_a_cached_calibration_is_used_again_only_for_the_same_question(monkeypatch):
    made = PrivacyPlan.from_config(calibrated(), num_examples=1000)
    calls = []
    real = accounting.noise_multiplier
    monkeypatch.setattr(accounting, "noise_multiplier", lambda **keys: (calls.append(keys), real(**keys))[1])
    assert PrivacyPlan.from_config(calibrated(), num_examples=1000, cached=made) == made
    reclipped = PrivacyPlan.from_config(calibrated(clip_norm=2.0), num_examples=1000, cached=made)
    assert reclipped.noise_multiplier == made.noise_multiplier
    assert calls == []
    for changed in (calibrated(epsilon=1.9), calibrated(expected_batch_size=101)):
        other = PrivacyPlan.from_config(changed, num_examples=1000, cached=made)
        assert other.epsilon_after(20) <= changed.privacy.epsilon
    assert len(calls) == 2


def test_a_cached_plan_edited_to_less_noise_is_not_believed():
    made = PrivacyPlan.from_config(calibrated(), num_examples=1000)
    edited = dataclasses.replace(made, noise_multiplier=made.noise_multiplier * 0.999)
    assert PrivacyPlan.from_config(calibrated(), num_examples=1000, cached=edited) == made


def test_json_comes_back_equal_and_is_readable():
    for made in (plan(), plan(max_batch_size=150), plan(unit="user", max_examples_per_user=9), plan(enabled=False)):
        assert PrivacyPlan.from_json(made.to_json()) == made
        assert PrivacyPlan.from_json(made.to_json()).digest() == made.digest()
    assert '"noise_multiplier": 1.5' in plan().to_json()


def changed(made: PrivacyPlan, key: str, value) -> PrivacyPlan:
    bound = {"bound": "per_group"} if key == "clip_groups" else {}
    return dataclasses.replace(made, **{key: value, **bound})


GROUPS = {"Conv_*": 0.3, "*": 0.4}


def test_the_noise_of_groups_is_that_of_the_root_of_their_squares_and_the_plan_shows_them():
    made = plan(bound="per_group", clip_groups=GROUPS)
    assert made.clip_norm == pytest.approx(0.5, rel=1e-15)
    assert made.noise_stddev == 1.5 * made.clip_norm * (1 + SLACK)
    assert made.clip_groups == (("Conv_*", 0.3), ("*", 0.4))
    assert PrivacyPlan.from_json(made.to_json()) == made
    reordered = plan(bound="per_group", clip_groups=dict(reversed(GROUPS.items())))
    assert reordered.digest() != made.digest()  # the first pattern that matches counts
    assert f"clip_groups: None -> {made.clip_groups}" in plan().differences(made)


def test_groups_without_their_bound_or_with_another_norm_are_refused():
    for values in ({"bound": "per_group"}, {"clip_groups": GROUPS}):
        with pytest.raises(InputError, match="give both or neither"):
            config(**values)
    made = plan(bound="per_group", clip_groups=GROUPS)
    for change in ({"clip_norm": 0.4}, {"clip_groups": None}, {"bound": "flat"}, {"clip_groups": (("*", 0.3),)}):
        with pytest.raises(InputError, match="group"):
            dataclasses.replace(made, **change)
    with pytest.raises(InputError, match="a pattern and a norm"):
        dataclasses.replace(made, clip_groups=(3,))


def test_the_digest_never_changes_between_versions_and_differs_for_every_field():
    made = plan()
    assert made.digest() == "d354c2f194c47282b8fab34b865638416fa8c51f6534a3991f69189bd584ca71"
    changes = {
        "num_examples": 1001,
        "sampling_rate": 0.11,
        "steps": 21,
        "expected_batch_size": 101.0,
        "noise_multiplier": 1.6,
        "clip_norm": 0.6,
        "delta": 2e-5,
        "epsilon_target": 1.0,
        "max_batch_size": 200,
        "clip_groups": (("*", 0.5),),
        "replay_reserve": 5,
        "max_examples_per_user": 10,
        "bound": "normalized",
        "unit": "user",
        "neighboring_relation": "add_or_remove",
        "accountant": "rdp",
        "enabled": False,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(PrivacyPlan)}
    digests = {changed(made, key, value).digest() for key, value in changes.items()}
    assert len(digests | {made.digest()}) == len(changes) + 1


def test_an_integer_and_the_same_float_are_the_same_plan():
    assert plan(expected_batch_size=100).digest() == plan(expected_batch_size=100.0).digest()


def test_differences_name_the_key_and_both_values():
    old, new = plan(), plan(clip_norm=0.6, unit="person")
    assert old.differences(old) == []
    assert old.differences(new) == ["clip_norm: 0.5 -> 0.6", "unit: example -> person"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"schema_version": None}, "schema_version 1"),
        ({"steps": "20"}, "wrong type"),
        ({"steps": True}, "wrong type"),
        ({"steps": None}, "wrong type"),
        ({"enabled": 1}, "wrong type"),
        ({"sigma": 1.0}, "unknown ones .sigma"),
        ({"steps": 0}, "at least one step"),
        ({"delta": 2}, "strictly between"),
        ({"accountant": "none"}, "choose one of pld"),
    ],
    ids=str,
)
def test_a_plan_file_of_another_kind_is_refused(edit, message):
    text = json.dumps({**json.loads(plan().to_json()), **edit})
    with pytest.raises(InputError, match=message):
        PrivacyPlan.from_json(text)


def test_a_plan_file_from_before_a_field_existed_is_the_same_plan():
    values = json.loads(plan().to_json())
    for name in ADDED:
        del values[name]
    old = PrivacyPlan.from_json(json.dumps(values))
    assert old == plan()
    assert old.digest() == plan().digest()


def test_a_torn_plan_file_is_refused():
    for text in ("", plan().to_json()[:50], "[]", "3"):
        with pytest.raises(RunDirectoryError):
            PrivacyPlan.from_json(text)
    values = json.loads(plan().to_json())
    del values["delta"]
    with pytest.raises(RunDirectoryError, match=r"lacks keys.*delta"):
        PrivacyPlan.from_json(json.dumps(values))


def test_an_expected_batch_above_the_data_set_names_both_numbers_and_the_remedy():
    with pytest.raises(InputError) as error:
        plan(num_examples=4500, expected_batch_size=6000)
    assert str(error.value) == (
        "expected_batch_size=6000 is larger than the data set (4500 examples): choose at most 4500, "
        "or set privacy.sampling_rate"
    )


# The config refuses most of these as well; a plan may also be made from Python, without it.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0, "noise_multiplier": None}, "epsilon=0.0: it must be > 0"),
        ({"epsilon": -1.0, "noise_multiplier": None}, "must be > 0"),
        ({"epsilon": 1.0}, "both are given"),
        ({"noise_multiplier": None}, "neither is given"),
        ({"noise_multiplier": -1.0}, "must be >= 0"),
        ({"delta": 0.0}, "strictly between"),
        ({"delta": 1.0}, "strictly between"),
        ({"delta": None}, "privacy.delta"),
        ({"delta": 1e-16}, "too small"),
        ({"clip_norm": math.inf}, "privacy.clip_norm"),
        ({"sampling_rate": 0.5}, "both are given"),
        ({"expected_batch_size": None}, "neither is given"),
        ({"expected_batch_size": None, "sampling_rate": 1.5}, "sampling_rate=1.5"),
        ({"steps": 0}, "at least one step"),
        ({"steps": None}, "neither is given"),
        ({"epochs": 1.0}, "both are given"),
        ({"steps": None, "epochs": -1.0}, "epochs=-1.0"),
        ({"accountant": "rdp", "max_batch_size": 200}, "truncated sampling"),
        ({"accountant": "rdp", "neighboring_relation": "replace_one"}, "replace_one"),
        ({"num_examples": 0}, "the training set is empty"),
    ],
    ids=str,
)
def test_bad_values_are_refused_before_anything_runs(change, message):
    keys = {
        "enabled": True,
        "epsilon": None,
        "noise_multiplier": 1.5,
        "delta": 1e-5,
        "clip_norm": 0.5,
        "expected_batch_size": 100,
        "sampling_rate": None,
        "max_batch_size": None,
        "unit": "example",
        "neighboring_relation": "zero_out",
        "accountant": "pld",
        "steps": 20,
        "epochs": None,
        "num_examples": 1000,
        **change,
    }
    keys = {"bound": "flat", "replay_reserve": 0, "constant_time": False, "max_examples_per_user": None, **keys}
    keys = {"clip_groups": None, **keys}
    training = SimpleNamespace(steps=keys.pop("steps"), epochs=keys.pop("epochs"))
    num_examples = keys.pop("num_examples")
    with pytest.raises(InputError, match=message):
        PrivacyPlan.from_config(
            SimpleNamespace(training=training, privacy=SimpleNamespace(**keys)), num_examples=num_examples
        )


def test_what_is_legal_but_weak_is_said():
    assert plan().warnings == []
    (warning,) = plan(delta=2e-3).warnings
    assert "above 1/1000" in warning
    (warning,) = plan(noise_multiplier=0).warnings
    assert "no guarantee" in warning
    (warning,) = plan(max_batch_size=50).warnings
    assert "below the expected batch size" in warning
    (warning,) = plan(neighboring_relation="add_or_remove").warnings
    assert "shows their number" in warning
    assert plan(enabled=False).warnings == []


def test_making_and_reading_plans_starts_neither_jax_nor_dp_accounting():
    code = (
        "import sys, dpscale.privacy.secret\n"
        "from dpscale.privacy import PrivacyPlan\n"
        f"made = PrivacyPlan.from_json({plan().to_json()!r})\n"
        "made.digest(), made.noise_stddev, made.warnings, made.differences(made)\n"
        "slow = {'jax', 'dp_accounting', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
