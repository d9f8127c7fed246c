"""The run's configuration: what is read, what is refused, and how it is said."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpscale.config import RunConfig, config_from_dict, describe_keys, load_config, to_toml
from dpscale.errors import InputError

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.toml"
SMALL = {
    "training": {"steps": 3},
    "privacy": {"epsilon": 1.0, "delta": 1e-5, "expected_batch_size": 10},
}


def with_values(**sections) -> dict:
    return {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL.keys() | sections.keys()}


def test_the_quickstart_is_read_as_the_issue_states_it():
    config = load_config(QUICKSTART)
    assert (config.privacy.epsilon, config.privacy.delta, config.privacy.clip_norm) == (3.0, 1e-5, 0.5)
    assert (config.privacy.expected_batch_size, config.training.steps) == (1024, 150)


def test_overrides_are_read_as_toml_and_as_text_when_that_fails():
    config = load_config(
        QUICKSTART,
        ["model.name=vit", "data.mean=[0.5,0.5]", "privacy.delta=1e-6", "metrics.sensitive=true", "run.name=a b"],
    )
    assert config.model.name == "vit"
    assert config.data.mean == [0.5, 0.5]
    assert config.privacy.delta == 1e-6
    assert config.metrics.sensitive is True
    assert config.run.name == "a b"


def test_unset_takes_a_files_value_away_and_quotes_keep_the_word():
    config = load_config(QUICKSTART, ["privacy.epsilon=unset", "privacy.noise_multiplier=2", 'run.name="unset"'])
    assert config.privacy.epsilon is None
    assert config.run.name == "unset"


def test_a_config_is_immutable():
    config = config_from_dict(SMALL)
    with pytest.raises(Exception, match="frozen"):
        config.privacy.delta = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["privacy.epsilonn=3"], ["privacy.epsilonn is not a known key", "did you mean epsilon"]),
        (["privcy.epsilon=3"], ["privcy is not a known key", "privacy"]),
        (["privacy.epsilon=-1"], ["privacy.epsilon=-1", "greater than 0"]),
        (["privacy.epsilon=0"], ["privacy.epsilon=0", "greater than 0"]),
        (["privacy.epsilon=nan"], ["privacy.epsilon=nan"]),
        (["privacy.delta=0"], ["privacy.delta=0"]),
        (["privacy.delta=1"], ["privacy.delta=1", "less than 1"]),
        (["privacy.epsilon=three"], ["privacy.epsilon='three'", "valid number"]),
        (["training.steps=1.5"], ["training.steps=1.5", "valid integer"]),
        (["training.epochs=3"], ["training.steps or training.epochs: both are given"]),
        (["privacy.noise_multiplier=1"], ["privacy.epsilon or privacy.noise_multiplier: both are given"]),
        (["privacy.sampling_rate=0.1"], ["privacy.expected_batch_size or privacy.sampling_rate: both are given"]),
        (["optimizer.beta1=0.9"], ["optimizer.beta1", "sgd", "adam"]),
        (["optimizer.warmup_steps=150"], ["warmup_steps=150", "training.steps=150"]),
        (["run.name=a/b"], ["run.name='a/b' is a path"]),
        (["training.steps"], ["write section.key=value"]),
        (["steps=3"], ["write section.key=value"]),
    ],
)
def test_bad_input_is_named_with_its_place_and_rule(overrides, parts):
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, overrides)
    for part in parts:
        assert part in str(caught.value)


def test_every_error_is_listed_at_once():
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, ["privacy.epsilon=-1", "training.steps=0", "run.nmae=x"])
    assert all(part in str(caught.value) for part in ("privacy.epsilon", "training.steps", "run.nmae"))


def test_held_out_data_must_be_declared_public_or_private():
    with pytest.raises(InputError, match=r"validation_is = .public."):
        config_from_dict(with_values(data={"validation": "x.npz"}))


def test_delta_is_required_with_privacy_and_not_without():
    privacy = {"epsilon": 1.0, "expected_batch_size": 10}
    with pytest.raises(InputError, match=r"privacy.delta is missing"):
        config_from_dict({"training": {"steps": 1}, "privacy": privacy})
    config_from_dict({"training": {"steps": 1}, "privacy": {"enabled": False, "expected_batch_size": 10}})


@pytest.mark.parametrize("kind", ["missing", "directory", "syntax", "binary"])
def test_a_file_that_is_no_config_is_refused_with_its_path(tmp_path, kind):
    path = tmp_path / "config.toml"
    if kind == "directory":
        path.mkdir()
    elif kind == "syntax":
        path.write_text("[run\nname=")
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config\.toml"):
        load_config(path)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0\n"), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(
    name=TEXT,
    unit=st.text(st.characters(codec="utf-8"), min_size=1),
    epsilon=st.floats(min_value=1e-300, max_value=1e300),
    option=st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.text(st.characters(codec="utf-8"))),
)
def test_a_config_written_as_toml_is_read_back_equal(name, unit, epsilon, option):
    config = config_from_dict(
        with_values(run={"name": name}, privacy={"unit": unit, "epsilon": epsilon}, model={"own": option})
    )
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


def test_every_key_is_documented():
    text = describe_keys()
    for section, field in RunConfig.model_fields.items():
        assert f"[{section}]" in text
        for key, info in field.annotation.model_fields.items():  # pyright: ignore[reportOptionalMemberAccess]
            assert info.description, f"{section}.{key} has no description"
            assert f"  {key} " in text


@pytest.mark.parametrize("given", ["0", "-3", "'most'", "1.5"])
def test_a_physical_batch_is_a_number_or_auto(given):
    assert load_config(QUICKSTART, ["performance.physical_batch_size=auto"]).performance.physical_batch_size == "auto"
    with pytest.raises(InputError, match=r"performance\.physical_batch_size="):
        load_config(QUICKSTART, [f"performance.physical_batch_size={given}"])
