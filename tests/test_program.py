"""Laws of the program's facts: whatever changes a step's output is seen, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.config import config_from_dict
from dpscale.program import DRAW_SOURCES, ROOT, STEP_SOURCES, differences, digest, program_facts, source_digest

PARAMS = {"w": jnp.ones(3)}
EXAMPLE = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
BASE = {
    "training": {"steps": 4},
    "privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 10},
}
VALUE = np.float32(1.5)
NEXT = np.nextafter(VALUE, np.float32(2))  # one last bit


def facts(loss, uses_key=False, **sections):
    values = {name: BASE.get(name, {}) | sections.get(name, {}) for name in BASE.keys() | sections.keys()}
    return program_facts(config_from_dict(values), loss, PARAMS, EXAMPLE, uses_key)


def product(params, example):
    return jnp.sum(params["w"] * example["x"])


def literal(value):
    return lambda params, example: product(params, example) * value


def closed_over(value):
    array = jnp.full(3, value)
    return lambda params, example: jnp.sum(params["w"] * array * example["x"])


def inside_jit(value):
    array = np.full(3, value)
    inner = jax.jit(lambda w, x: jnp.sum(w * array * x))
    return lambda params, example: inner(params["w"], example["x"])


def inside_scan_and_checkpoint(value):
    array = jnp.full(3, value)
    body = jax.checkpoint(jax.jit(lambda total, x: (total + jnp.sum(array * x), None)))
    return lambda params, example: jax.lax.scan(body, 0.0, params["w"] * example["x"])[0]


def custom_backward(value):
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (g * value,))
    return lambda params, example: jnp.sum(double(params["w"] * example["x"]))


def custom_tangent(value):
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * value))
    return lambda params, example: jnp.sum(double(params["w"] * example["x"]))


LOSSES = [literal, closed_over, inside_jit, inside_scan_and_checkpoint, custom_backward, custom_tangent]


@pytest.mark.parametrize("make", LOSSES)
def test_the_last_bit_of_a_constant_anywhere_in_the_loss_is_seen(make):
    assert facts(make(VALUE)) == facts(make(VALUE))
    assert [d.split(":")[0] for d in differences(facts(make(VALUE)), facts(make(NEXT)))] == ["loss"]


def test_a_loss_with_a_key_is_digested(monkeypatch):
    def loss(params, example, key):
        return product(params, example) + jax.random.normal(key)

    assert facts(loss, uses_key=True) == facts(loss, uses_key=True)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "learning_rate", 0.3),
        ("optimizer", "momentum", 0.9),
        ("run", "seed", 1),
        ("training", "label_smoothing", 0.1),
        ("performance", "compute_dtype", "bfloat16"),
        ("data", "random_flip", True),
        ("model", "widths", [3]),
    ],
)
def test_what_changes_an_update_is_shown(section, key, value):
    shown = differences(facts(product), facts(product, **{section: {key: value}}))
    assert [line.split(":")[0] for line in shown] == [f"{section}.{key}"]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("performance", {"physical_batch_size": 8, "clipping_method": "ghost"}),
        ("checkpoint", {"every_steps": 2, "keep": 5}),
        ("metrics", {"sensitive": True}),
        ("run", {"name": "other"}),
        ("data", {"num_threads": 1, "residence": "device", "validation": "x.npz", "validation_is": "public"}),
        ("training", {"evaluate_every_steps": 2}),
    ],
)
def test_what_changes_no_update_may_change_on_resume(section, values):
    assert differences(facts(product), facts(product, **{section: values})) == []


@pytest.mark.parametrize(
    ("name", "value"), [("jax_threefry_partitionable", False), ("jax_default_matmul_precision", "bfloat16")]
)
def test_a_setting_of_jax_that_changes_draws_or_products_is_seen(name, value):
    def loss(params, example, key):
        return jnp.dot(params["w"], example["x"]) * jax.random.normal(key)

    before, old = facts(loss, uses_key=True), getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert differences(before, facts(loss, uses_key=True))
    finally:
        jax.config.update(name, old)
    assert facts(loss, uses_key=True) == before


def test_two_processes_agree():
    """Addresses and hash seeds differ between processes; the digest must not."""
    script = (
        "import test_program as t; from dpscale.program import digest\n"
        "print(*(digest(t.facts(make(t.VALUE))) for make in t.LOSSES))"
    )

    out = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [digest(facts(make(VALUE))) for make in LOSSES]


def test_an_installation_edited_in_place_is_seen_where_a_step_is_made(tmp_path):
    copy = tmp_path / "dpscale"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(copy)
    assert before == source_digest() == facts(product)["dpscale source"]
    for name in DRAW_SOURCES + STEP_SOURCES:
        file = copy / f"{name}.py"
        file = file if file.exists() else copy / name / "__init__.py"
        text = file.read_bytes()
        file.write_bytes(text.replace(b"return", b"return ", 1))
        assert source_digest(copy) != before, name
        file.write_bytes(text)
    (copy / "report.py").write_text("")
    assert source_digest(copy) == before
