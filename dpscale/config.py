"""RunConfig: one TOML file, read into frozen pydantic models, with `section.key=value` overrides. Imports no jax."""

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, Field, model_validator

from dpscale.errors import InputError, did_you_mean
from dpscale.sections import (
    CheckpointSection,
    DataSection,
    MetricsSection,
    ModelSection,
    OptimizerSection,
    PerformanceSection,
    PrivacySection,
    RunSection,
    Section,
    TrainingSection,
)

UNSET = "unset"  # as an override's value: the file's value is taken away; the text "unset" is written in quotes


class RunConfig(Section):
    """Everything that a run is told. Immutable; two equal configs make the same plan."""

    run: RunSection = Field(default_factory=RunSection)  # pyright: ignore[reportArgumentType]
    data: DataSection = Field(default_factory=DataSection)  # pyright: ignore[reportArgumentType]
    model: ModelSection = Field(default_factory=ModelSection)  # pyright: ignore[reportArgumentType]
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)  # pyright: ignore[reportArgumentType]
    training: TrainingSection
    privacy: PrivacySection
    performance: PerformanceSection = Field(default_factory=PerformanceSection)  # pyright: ignore[reportArgumentType]
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)  # pyright: ignore[reportArgumentType]
    metrics: MetricsSection = Field(default_factory=MetricsSection)  # pyright: ignore[reportArgumentType]

    @model_validator(mode="after")
    def _users_are_bounded(self):
        by_user = self.privacy.unit == "user"
        if by_user and self.privacy.max_examples_per_user is None:
            raise ValueError(
                'privacy.unit = "user" but privacy.max_examples_per_user is missing: a user is sampled with a bounded '
                'set of records; 10 to 100 are usual. If each user has one record, another word ("person") will do'
            )
        for name, value in (
            ("privacy.max_examples_per_user", self.privacy.max_examples_per_user),
            ("data.user_key", self.data.user_key),
        ):
            if value is not None and not by_user:
                raise ValueError(
                    f'{name} is given but privacy.unit={self.privacy.unit!r}: set it to "user", or leave {name} out'
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self):
        steps, warmup = self.training.steps, self.optimizer.warmup_steps
        if steps is not None and warmup >= steps and warmup > 0:
            raise ValueError(
                f"optimizer.warmup_steps={warmup} is not below training.steps={steps}: the run would end within its "
                "warm-up; choose fewer"
            )
        return self


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `section.key=value` overrides.

    Args:
        path: the TOML file.
        overrides: each `section.key=value`; the value is read as TOML, and as a string when that fails.
            `section.key=unset` takes the file's value away.

    Raises:
        InputError: the file cannot be read or parsed, or one or more values are wrong; every error is listed
            with its place, unknown keys with the nearest valid ones.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory: give the TOML file in it")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read ({error}): give a readable UTF-8 TOML file") from error
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError of its own
        raise InputError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values, source=str(path))


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate nested dictionaries as a RunConfig.

    Raises:
        InputError: every error in one message, each with its place and remedy.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except pydantic.ValidationError as error:
        lines = list(dict.fromkeys(_explain(item) for item in error.errors()))
        raise InputError(f"{source}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from None


def partial_config(overrides: Sequence[str], sections: Sequence[str]) -> RunConfig:
    """Defaults and `section.key=value` overrides, for verbs that need only some sections of a config.

    Raises:
        InputError: an override of another section, and what `load_config` refuses.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override)
    if set(values) - set(sections):
        useful = " or ".join(f"{section}.key=value" for section in sections)
        raise InputError(f"{', '.join(sorted(set(values) - set(sections)))} is of no use here: give {useful} only")
    rest = {"training": {"steps": 1}, "privacy": {"enabled": False, "sampling_rate": 1.0}}
    return config_from_dict({**rest, **values}, source="the command line")


def to_toml(config: RunConfig) -> str:
    """The config as TOML that `load_config` reads back to an equal config; unset keys are left out."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def describe_keys() -> str:
    """One line for every key: name, type, default and meaning; what `dpscale train --help-config` prints."""
    lines = []
    for section, field in RunConfig.model_fields.items():
        lines.append(f"[{section}]")
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for key, info in model.model_fields.items():
            default = "required" if info.is_required() else f"default {json.dumps(info.default)}"
            lines.append(f"  {key:<22} {info.description} ({default.replace('default null', 'unset')})")
        lines.append("")
    return "\n".join(lines)


def nearest(name: str, valid: Sequence[str]) -> str:
    """'did you mean ..' when something is close, else the valid names."""
    return did_you_mean(name, valid).rstrip() or f"valid: {', '.join(sorted(valid))}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    place, equals, text = override.partition("=")
    unset = text.strip() == UNSET
    keys = place.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise InputError(f"override {override!r}: write section.key=value, for example privacy.epsilon=3")
    section = values.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise InputError(f"override {override!r}: {keys[0]} is a value in the config file, not a section")
    if unset:
        section.pop(keys[1], None)
        return
    try:
        section[keys[1]] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        section[keys[1]] = text


def _explain(error: Any) -> str:
    # A key has two parts; what follows is an index into a list, or which of several types was tried.
    place = ".".join(str(part) for part in error["loc"][:2])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        section = RunConfig.model_fields[str(parents[0])].annotation if parents else RunConfig
        valid = list(getattr(section, "model_fields", {}))
        return f"{place} is not a known key: {nearest(str(key), valid)}"
    if error["type"] == "missing":
        return f"{place} is missing: it has no default"
    if error["type"] == "value_error":
        return message
    return f"{place}={error['input']!r}: {message[0].lower() + message[1:]}"


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value)
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    raise InputError(f"{value!r} has no TOML form: use text, numbers, booleans, lists and tables")
