"""`dpscale bench`: every method on one model, in turn, and ratios to the step without privacy."""

import json

import pytest
from typer.testing import CliRunner

from dpscale.bench import METHODS, compare
from dpscale.cli import app
from dpscale.errors import InputError


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "mlp", "--size", "8", "model.widths=[16]"),
        pytest.param(("--model", "vit", "--size", "8", "model.depth=1", "model.width=18"), marks=pytest.mark.slow),
        pytest.param(
            ("--model", "gpt", "--size", "6", "model.depth=1", "model.width=16", "model.heads=2"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_methods_are_timed_and_compared_with_the_step_without_privacy(tmp_path, arguments):
    out = tmp_path / "bench.json"
    result = run(*arguments, "--batch-size", "3", "--repeats", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert tuple(record["methods"]) == METHODS
    assert record["methods"]["nonprivate"]["times_sgd"] == 1.0
    for name, cost in record["methods"].items():
        assert name in result.output
        assert 0 < cost["fastest_s"] <= cost["time_s"] <= cost["slowest_s"]


def test_an_unknown_method_and_a_useless_section_are_named():
    assert isinstance(run("--model", "mlp", "--method", "magic").exception, InputError)
    assert "optimizer" in str(run("--model", "mlp", "optimizer.learning_rate=1").exception)


def test_ratios_are_to_the_fastest_plain_step():
    import jax.numpy as jnp

    def slow(x):
        return jnp.linalg.matrix_power(x, 64)

    costs = compare({"a": slow, "b": lambda x: x + 1, "c": slow}, (jnp.eye(200),), 3, ["a", "b"])
    assert costs["b"].times_sgd == 1.0
    assert costs["c"].times_sgd == costs["c"].time_s / costs["b"].time_s
