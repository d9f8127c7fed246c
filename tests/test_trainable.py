"""Laws of what is trained: frozen leaves leave the parameters, adapters reach them, and a run with either is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from safetensors.numpy import load_file

from dpscale.clipping import clipped_grad
from dpscale.config import config_from_dict
from dpscale.data.arrays import ArraySource
from dpscale.errors import InputError, RunDirectoryError
from dpscale.models import as_functional, build_model
from dpscale.models.leaves import as_tree, join, named, split
from dpscale.models.trainable import add_lora, check_lora_is_used, merge_lora, trainable_names, with_lora
from dpscale.release import release
from dpscale.release_files import load_release
from dpscale.task import build_task, full_params, weights_digest
from dpscale.train import train

SMALL = {"width": 8, "depth": 2, "heads": 2, "patch_size": 4}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 8, 8, 1)).astype(np.uint8)
SOURCE = ArraySource(PIXELS, np.arange(24, dtype=np.int32) % 3, num_classes=3)


def config_of(steps=2, **model):
    return config_from_dict(
        {
            "data": {"train": "given", "num_classes": 3},
            "model": {"name": "vit", **SMALL, **model},
            "training": {"steps": steps},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 6, "insecure_seed": 1},
            "performance": {"physical_batch_size": 4},
            "checkpoint": {"every_steps": 1},
        }
    )


def shapes_of(**options):
    module = build_model("vit", 3, **SMALL, **options)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((8, 8, 1)))["params"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["all"], lambda name: True),
        (["head"], lambda name: name.startswith("head/")),
        (["bias", "head"], lambda name: name.endswith("bias") or name.startswith("head/")),
        (["last:1"], lambda name: name.startswith(("blocks_1/", "norm/", "head/"))),
        (["last:0"], lambda name: name.startswith(("norm/", "head/"))),
        (["*/query/*", "!blocks_0/*"], lambda name: name.startswith("blocks_1/attention/query/")),
    ],
)
def test_words_and_patterns_choose_leaves_by_name(chosen, expected):
    params = shapes_of()
    assert trainable_names(params, chosen) == {name for name in named(params) if expected(name)}


@pytest.mark.parametrize(
    ("chosen", "pattern"),
    [
        (["heads/*"], "matches no parameter: did you mean head/"),
        (["all", "!*"], "leaves no parameter"),
        (["last:3"], "has 2 blocks"),
        (["last:x"], "takes a number of blocks"),
        (["lora"], "'lora' matches no parameter"),
    ],
)
def test_what_chooses_nothing_is_refused(chosen, pattern):
    with pytest.raises(InputError, match=pattern):
        trainable_names(shapes_of(), chosen)


def test_split_and_join_are_inverse_and_lists_are_refused():
    tree = {"a": {"b/c": 1, "d": 2}, "e": 3}
    assert as_tree(named(tree)) == tree
    one, other = split(tree, {"a/d"})
    assert (one, other) == ({"a": {"d": 2}}, {"a": {"b/c": 1}, "e": 3})
    assert join(one, other) == tree
    with pytest.raises(InputError, match="nested dicts"):
        named({"a": [1, 2]})


def test_only_trainable_leaves_are_parameters_and_the_loss_is_the_whole_models():
    everything, some = (
        build_task(config_of(), SOURCE.metadata),
        build_task(config_of(trainable="last:1"), SOURCE.metadata),
    )
    assert set(some.params) == {"blocks_1", "norm", "head"}
    assert set(named(some.params)) | set(named(some.frozen)) == set(named(everything.params))
    assert any("trainable" in note for note in some.notes)
    example, key = {"features": PIXELS[0], "label": jnp.int32(1)}, None
    assert some.loss(some.params, example, key) == everything.loss(everything.params, example, key)
    other = some.bind(jax.tree.map(lambda x: x + 1.0, some.frozen))
    assert other.loss(some.params, example, key) != some.loss(some.params, example, key)
    assert everything.weight_facts() == {}
    assert some.weight_facts() == {"frozen weights": weights_digest(some.frozen)}
    assert other.weight_facts() != some.weight_facts()


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_start_at_the_model_as_it_was_and_merge_into_it(scan):
    module = build_model("vit", 3, **SMALL, scan=scan)
    functional = as_functional(module, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
    params = add_lora(functional.params, 2, ["*/query", "*/mlp_in"], seed=1)
    adapted = with_lora(functional.apply, 0.5)
    check_lora_is_used(adapted, params, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
    x = jnp.asarray(PIXELS[0], jnp.float32) / 255
    both = jax.jit(lambda p, q: (adapted(p, x, None), functional.apply(q, x, None)))
    np.testing.assert_allclose(*both(params, functional.params), rtol=1e-6)
    moved = {n: leaf + 0.3 if n.endswith("lora_b") else leaf for n, leaf in named(params).items()}
    ours, plain = both(as_tree(moved), merge_lora(as_tree(moved), 0.5))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert not np.allclose(ours, adapted(params, x, None), atol=1e-3)


def test_adapters_that_cannot_work_are_refused():
    params = shapes_of()
    with pytest.raises(InputError, match="matches no dense layer"):
        add_lora(params, 2, ["*/queri"], seed=0)
    with pytest.raises(InputError, match="above the smaller side of head, 3"):
        add_lora(params, 4, ["head"], seed=0)

    class NotDense(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x @ self.param("kernel", linen.initializers.ones, (4, 3))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return NotDense(name="layer")(x)

    functional = as_functional(Net(), jax.ShapeDtypeStruct((4,), jnp.float32))
    adapted = add_lora(functional.params, 2, ["layer"], seed=0)
    with pytest.raises(InputError, match=r"flax\.linen\.Dense"):
        check_lora_is_used(with_lora(functional.apply, 1.0), adapted, jax.ShapeDtypeStruct((4,), jnp.float32))


def test_adapters_are_clipped_by_fast_routes():
    task = build_task(config_of(lora_rank=2), SOURCE.metadata)
    assert {name.rsplit("/", 1)[-1] for name in named(task.params)} == {"lora_a", "lora_b", "kernel", "bias"}
    batch = {"features": jnp.asarray(PIXELS[:2]), "label": jnp.arange(2)}
    keys = jax.random.split(jax.random.wrap_key_data(np.zeros(2, np.uint32), impl="threefry2x32"), 2)
    routes = {x.name: x.route for x in clipped_grad(task.loss, 1.0).explain(task.params, batch, keys).layers}
    assert all(route != "materialised" for name, route in routes.items() if "lora" in name)


@pytest.mark.slow
def test_a_run_trains_the_chosen_leaves_alone_and_resumes_only_with_the_same_frozen_ones(tmp_path):
    config, told = config_of(lora_rank=2), []
    task = build_task(config, SOURCE.metadata)
    result = train(config, tmp_path / "run", train_data=SOURCE, progress=False, report=told.append)
    assert set(named(result.params)) == set(named(task.params))
    assert all(
        np.any(np.asarray(a) != b)
        for a, b in zip(jax.tree.leaves(task.params), jax.tree.leaves(result.params), strict=True)
    )
    assert any(line.startswith("trainable") for line in told)
    (frozen,) = (tmp_path / "run").glob("frozen-*.safetensors")
    kept = load_file(frozen)
    for name, leaf in named(task.frozen).items():
        np.testing.assert_array_equal(kept[name], leaf)
    whole = full_params(task, result.params)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, shapes_of())
    before, after = (
        named(task.frozen)["blocks_0/attention/query/kernel"],
        named(whole)["blocks_0/attention/query/kernel"],
    )
    assert not np.allclose(before, after, atol=1e-4)
    # What is released is the plain model, whole.
    said = ["privacy.public_data_used=none", "privacy.hyperparameter_search=none"]
    released = load_release(release(tmp_path / "run", tmp_path / "out", statements=said, report=told.append)).params
    assert set(named(released)) == set(named(whole))
    for name, leaf in named(released).items():
        np.testing.assert_allclose(leaf, named(whole)[name], rtol=1e-6, atol=1e-7)
    # Weights that were overwritten since are noticed by their digest, and written again by the next start.
    written = frozen.read_bytes()
    frozen.write_bytes(written[:-4] + bytes(4))
    with pytest.raises(RunDirectoryError, match="does not hold the weights that this step was trained with frozen"):
        release(tmp_path / "run", tmp_path / "other", statements=said, report=told.append)
    assert not (tmp_path / "other").exists()
    train(config, tmp_path / "run", train_data=SOURCE, progress=False, report=told.append)
    assert frozen.read_bytes() == written
    # Another initialisation of the frozen leaves is another program.
    moved = config_from_dict({**config_of(steps=2, lora_rank=2).model_dump(exclude_none=True), "run": {"seed": 9}})
    with pytest.raises(InputError, match="frozen weights"):
        train(moved, tmp_path / "run", train_data=SOURCE, progress=False, report=told.append)


@pytest.mark.slow
def test_the_frozen_weights_are_arguments_of_the_compiled_step_and_not_constants_in_it():
    from dpscale.gradients import gradient_sum
    from dpscale.privacy.plan import PrivacyPlan

    config = config_of(trainable="head", width=64)
    task = build_task(config, SOURCE.metadata)
    plan = PrivacyPlan.from_config(config, num_examples=len(SOURCE))
    batch = {"features": jnp.asarray(PIXELS[:2]), "label": jnp.arange(2)}
    keys = jax.random.split(jax.random.wrap_key_data(np.zeros(2, np.uint32), impl="threefry2x32"), 2)
    summed = gradient_sum(config, plan, task)
    text = jax.jit(summed).lower(task.params, batch, jnp.ones(2, bool), keys, task.frozen).as_text()
    assert len(text) < 16 * sum(leaf.nbytes for leaf in jax.tree.leaves(task.frozen)) / 8
    assert 'dense<"0x' not in text
