"""Every script of docs/examples runs as it stands and reaches what it is there to show."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run(name: str, **arguments):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**arguments)


def test_every_example_is_tested():
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_own_linen_model_learns_within_its_epsilon(tmp_path):
    result = run("own_linen_model", run_dir=tmp_path / "run")
    assert result.validation["accuracy"] > 0.6  # chance is 0.1
    assert 7.9 < result.epsilon <= 8.0


@pytest.mark.slow
def test_own_nnx_model_learns(tmp_path):
    result = run("own_nnx_model", run_dir=tmp_path / "run")
    assert result.validation["accuracy"] > 0.6
    assert result.state == "finished"


@pytest.mark.slow
def test_own_loss_finds_the_slope(tmp_path):
    result = run("own_loss", run_dir=tmp_path / "run")
    np.testing.assert_allclose(result.params["slope"], [1.0, -0.5, 0.25], atol=0.25)


def test_clipped_gradients_runs():
    out = run("clipped_gradients")
    assert out.norms.shape == (32,)
    assert not np.any(np.asarray(out.norms)[30:])


def test_sampling_draws_the_same_examples_everywhere():
    assert len(run("sampling")) > 0


@pytest.mark.slow
def test_accounting_prints_the_quickstart_noise():
    assert run("accounting") == pytest.approx(4.0299, abs=1e-3)
