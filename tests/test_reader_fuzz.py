"""Whatever bytes a file holds, its reader gives a valid object or an error of ours (bounded numbers of examples)."""

import json
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpscale.config import RunConfig, config_from_dict, load_config, to_toml
from dpscale.errors import DpscaleError
from dpscale.privacy.plan import PrivacyPlan

QUICKSTART = (Path(__file__).parent.parent / "configs" / "quickstart.toml").read_bytes()
PLAN = PrivacyPlan(
    num_examples=1000,
    sampling_rate=0.1,
    steps=20,
    expected_batch_size=100.0,
    noise_multiplier=1.5,
    clip_norm=0.5,
    delta=1e-5,
    epsilon_target=None,
)
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 12), st.binary(max_size=6)), min_size=1, max_size=4
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BOUNDED = settings(max_examples=120, deadline=None, derandomize=True)


def edited(data: bytes, edits) -> bytes:
    for place, length, new in edits:
        start = int(place * len(data))
        data = data[:start] + new + data[start + length :]
    return data


def read(data: bytes) -> RunConfig | None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        try:
            return load_config(file.name)
        except DpscaleError:
            return None


@BOUNDED
@given(edits=EDITS)
def test_an_edited_config_is_refused_or_read_back_from_what_it_is_written_as(edits):
    config = read(edited(QUICKSTART, edits))
    if config is not None:
        assert config_from_dict(tomllib.loads(to_toml(config))) == config


@BOUNDED
@given(data=st.binary(max_size=80))
def test_any_bytes_are_a_config_or_an_error_of_ours(data):
    read(data)


@BOUNDED
@given(section=st.sampled_from(sorted(RunConfig.model_fields)), data=st.data())
def test_any_value_of_any_key_is_taken_or_refused_and_never_gives_a_plan_with_less_noise_than_it_says(section, data):
    keys = sorted(RunConfig.model_fields[section].annotation.model_fields)
    values = tomllib.loads(QUICKSTART.decode())
    key = data.draw(st.sampled_from([*keys, "nonsense"]))
    values.setdefault(section, {})[key] = data.draw(VALUES)
    try:
        config = config_from_dict(values)
        noise = {"epsilon": None, "noise_multiplier": 1.0} if config.privacy.epsilon is not None else {}
        cheap = config.model_copy(update={"privacy": config.privacy.model_copy(update=noise)})  # no calibration
        plan = PrivacyPlan.from_config(cheap, num_examples=4500)
    except DpscaleError:
        return
    assert plan.enabled == config.privacy.enabled
    if plan.enabled:
        assert (plan.noise_multiplier, plan.delta) == (cheap.privacy.noise_multiplier, cheap.privacy.delta)
        assert plan.sampling_rate * 4500 >= plan.expected_batch_size * (1 - 1e-12)


@BOUNDED
@given(edits=EDITS)
def test_an_edited_plan_is_refused_or_told_from_the_run_s_own_by_its_digest(edits):
    text = edited(PLAN.to_json().encode(), edits).decode(errors="replace")
    try:
        plan = PrivacyPlan.from_json(text)
    except DpscaleError:
        return
    assert (plan.digest() == PLAN.digest()) == (plan == PLAN)


@BOUNDED
@given(name=st.sampled_from([*json.loads(PLAN.to_json()), "nonsense"]), value=VALUES)
def test_any_value_in_a_plan_is_taken_or_refused(name, value):
    try:
        plan = PrivacyPlan.from_json(json.dumps({**json.loads(PLAN.to_json()), name: value}))
    except DpscaleError:
        return
    assert (plan.digest() == PLAN.digest()) == (plan == PLAN)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", '{"schema_version": 1}', '{"schema_version": NaN}'])
def test_deeply_nested_or_empty_plans_are_refused(text):
    with pytest.raises(DpscaleError):
        PrivacyPlan.from_json(text)


@pytest.mark.parametrize("value", [b"[" * 100_000, b"9" * 5_000], ids=["nested", "long"])
def test_deeply_nested_or_endless_toml_is_refused(value):
    assert read(b"a = " + value) is None
    with pytest.raises(DpscaleError):
        load_config(Path(__file__).parent.parent / "configs" / "quickstart.toml", [f"data.mean={value.decode()}"])
