"""Laws of the recipes: each is what its head comment says, and each runs, small, through the same code."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.config import load_config
from dpscale.models import build_model
from dpscale.models.leaves import named
from dpscale.models.trainable import trainable_names
from dpscale.privacy.plan import PrivacyPlan

CONFIGS = Path(__file__).parent.parent / "configs"
PIXELS, SMALL_PIXELS = (224, 224, 3), (32, 32, 3)
CIFAR, IMAGENET, SST2, WINDOWS, MNIST5K = 50_000, 1_281_167, 67_349, 9_035_582_198 // 1025, 4_500
# name -> (examples of the real data, shape of one, parameters, steps, published noise multiplier)
RECIPES = {
    "vit_b16_cifar100": (CIFAR, PIXELS, 85_875_556, 4, None),
    "bit_resnet50_cifar100": (CIFAR, PIXELS, 23_705_252, 4, None),
    "bert_base_sst2": (SST2, (128,), 109_483_778, 203, None),
    "imagenet_resnet18_places365": (IMAGENET, PIXELS, 11_687_720, 1369, 1.3127),
    "imagenet_resnet50_places365": (IMAGENET, PIXELS, 25_549_352, 1369, 1.3127),
    "wrn16_4_cifar10": (CIFAR, SMALL_PIXELS, 2_753_818, 2500, 3.0),
    "wrn40_4_cifar10": (CIFAR, SMALL_PIXELS, 8_961_306, 2000, 9.4),
    "gpt_small": (WINDOWS, (1024,), 124_439_808, 10_000, None),
    "mnist_cnn": (MNIST5K, (28, 28, 1), 26_010, 150, None),
    "mnist_scattering": (MNIST5K, (1953,), 19_540, 30, None),
    "quickstart": (MNIST5K, (28, 28, 1), 26_010, 150, None),
}


def config_of(name, *overrides):
    return load_config(CONFIGS / f"{name}.toml", overrides)


def head_of(name):
    """The comment at the head of a recipe, as one text."""
    text = (CONFIGS / f"{name}.toml").read_text()
    lines = text.partition("\n[")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def smoke_overrides(name):
    return (CONFIGS / "smoke" / f"{name}.txt").read_text().split()


def parameters_of(name):
    """The model's parameters as shapes, nothing computed."""
    config = config_of(name)
    options = config.model.options
    model = build_model(config.model.name, config.data.num_classes, compute_dtype="float32", **options)
    shape = RECIPES[name][1]
    tokens = len(shape) == 1 and config.model.name != "mlp"
    example = jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), example)["params"]


def test_every_config_is_tested_and_has_a_smoke_form():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(RECIPES)
    assert {path.stem for path in (CONFIGS / "smoke").glob("*.txt")} == set(RECIPES) - {"quickstart"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_head_comment_says_what_the_config_does(name):
    head, config = head_of(name), config_of(name)
    for word in ("Reproduces:", "Hardware:", "Command:", "Time:", "Privacy:", "Result:"):
        assert word in head, word
    assert "Data: " in head or name in ("mnist_cnn", "quickstart")  # which need no file
    assert f"dpscale train configs/{name}.toml $(cat configs/smoke/{name}.txt)" in head or name == "quickstart"
    said = re.search(r"Privacy: +epsilon (\S+) at delta (\S+), unit: one (\w+)", head)
    assert said is not None
    assert (float(said[1]), float(said[2])) == (config.privacy.epsilon, config.privacy.delta)
    assert config.privacy.unit.startswith(said[3])
    assert config.run.name == name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_model_has_the_published_number_of_parameters(name):
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters_of(name))) == RECIPES[name][2]


@pytest.mark.parametrize(("name", "first_trained"), [("18", 6), ("50", 13)])
def test_imagenet_trains_the_last_stage_as_published(name, first_trained):
    name = f"imagenet_resnet{name}_places365"
    chosen = config_of(name).model.trainable
    assert chosen is not None
    parameters = parameters_of(name)
    trained = trainable_names(parameters, chosen)
    blocks = {int(leaf.split("/")[0].removeprefix("blocks_")) for leaf in trained if leaf.startswith("blocks_")}
    assert min(blocks) == first_trained
    widths = {named(parameters)[f"blocks_{block}/conv_0/kernel"].shape[-1] for block in blocks}
    assert widths == {512}  # nothing of an earlier stage
    assert {leaf.split("/")[0] for leaf in trained if not leaf.startswith("blocks_")} == {"norm", "head"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in sorted(RECIPES)])
def test_the_plan_keeps_the_stated_epsilon_on_the_real_data_size(name):
    examples, _, _, steps, published_noise = RECIPES[name]
    plan = PrivacyPlan.from_config(config_of(name), num_examples=examples)
    assert plan.steps == steps
    epsilon = config_of(name).privacy.epsilon
    assert epsilon is not None
    assert 0.995 * epsilon < plan.epsilon_after(plan.steps) <= epsilon
    assert not plan.warnings or name.startswith("imagenet")  # whose published delta is just above 1 / examples
    if published_noise is not None:
        # Published with RDP accountants; PLD, the default, finds that a little less noise is enough.
        published = dataclasses.replace(plan, noise_multiplier=published_noise, accountant="rdp")
        assert 0.88 * epsilon < published.epsilon_after(plan.steps) <= epsilon
        assert plan.noise_multiplier < published_noise


@pytest.fixture(scope="module")
def made_up_data(tmp_path_factory):
    """The folder that the documented script writes, once."""
    spec = importlib.util.spec_from_file_location("make_data", CONFIGS / "smoke" / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("smoke")
    module.write_all(root / "smoke-data")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"quickstart"}))
def test_the_smoke_form_runs_the_recipes_code(name, made_up_data, tmp_path):
    """As the head comment says, by the command line; on one device, and compiled without the optimisation that would
    take most of the time.
    """
    real = config_of(name)
    config = config_of(name, *smoke_overrides(name))
    for section, key in (
        ("model", "name"),
        ("optimizer", "name"),
        ("optimizer", "schedule"),
        ("privacy", "bound"),
        ("data", "format"),
        ("training", "evaluate_ema"),
        ("performance", "compute_dtype"),
        ("performance", "update_sharding"),
    ):
        assert getattr(getattr(config, section), key) == getattr(getattr(real, section), key)
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "dpscale", "train", str(CONFIGS / f"{name}.toml"), *smoke_overrides(name)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        cwd=made_up_data,
        env={**environment, "PYTHONPATH": str(CONFIGS.parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "run" / "metrics" / "public.jsonl").read_text().splitlines()[-1])
    assert last["epsilon"] <= real.privacy.epsilon
    assert np.isfinite(last["validation_loss"])
