"""Laws of the norms of groups of leaves: they are those of vmap(grad), and asking for them changes nothing else."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import Flat, NormGroups, PerPattern, by_module, clipped_grad
from dpscale.errors import InputError


class Net(nn.Module):
    """A module with small leaves that are measured side by side, a nested one, and a scale without a product."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="first")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(3, name="head")(nn.tanh(x))


RNG = np.random.default_rng(8)
BATCH = jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32)
MASK = jnp.array([True, True, False, True, True, True])
PARAMS: Any = Net().init(jax.random.key(0), BATCH[0])["params"]


def loss(params, x):
    return jnp.sum(jnp.square(Net().apply({"params": params}, x) - x[:3]))  # pyright: ignore[reportArgumentType]


def norms_by_hand(names: list[list[str]]) -> np.ndarray:
    """[groups, rows] of the modules in each group."""
    grads = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, BATCH)
    flat = [
        [leaf.reshape(len(BATCH), -1) for name in group for leaf in jax.tree.leaves(grads[name])] for group in names
    ]
    return np.stack([np.linalg.norm(np.concatenate(parts, axis=1), axis=1) for parts in flat])


PATTERNS = PerPattern((("*/bias", 0.3), ("*", 0.4)))


@pytest.mark.parametrize(
    ("method", "bound"),
    [("materialize", Flat(0.5)), ("ghost", Flat(0.5)), ("bookkeeping", Flat(0.5)), ("bookkeeping", PATTERNS)],
)
def test_norms_of_modules_are_those_of_every_examples_own_gradient(method, bound):
    groups = by_module(PARAMS)
    assert groups.names == ("first", "head", "norm")
    out = clipped_grad(loss, bound=bound, method=method, norm_groups=groups)(PARAMS, BATCH, MASK)
    plain = clipped_grad(loss, bound=bound, method=method)(PARAMS, BATCH, MASK)
    assert plain.group_norms is None
    expected = norms_by_hand([["first"], ["head"], ["norm"]]) * np.asarray(MASK)
    np.testing.assert_allclose(out.group_norms, expected, rtol=1e-4)
    np.testing.assert_allclose(out.norms, plain.norms, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(out.grad_sum), jax.tree.leaves(plain.grad_sum), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ghost", "materialize"])
def test_a_row_that_counts_for_nothing_has_norm_zero_in_every_group(method):
    broken = BATCH.at[1].set(jnp.nan)
    clipped = clipped_grad(loss, method=method, norm_groups=by_module(PARAMS))
    out = clipped(PARAMS, broken, MASK)
    assert out.group_norms is not None
    np.testing.assert_array_equal(np.asarray(out.group_norms)[:, [1, 2]], 0)
    whole = clipped(PARAMS, BATCH, MASK).group_norms
    assert whole is not None
    np.testing.assert_array_equal(
        np.delete(np.asarray(out.group_norms), [1, 2], 1), np.delete(np.asarray(whole), [1, 2], 1)
    )


def test_frozen_leaves_belong_to_no_group():
    trainable = {"first": False, "norm": True, "head": True}
    out = clipped_grad(loss, norm_groups=by_module(PARAMS), trainable=trainable)(PARAMS, BATCH, MASK)
    assert out.group_norms is not None
    assert not np.any(out.group_norms[0])
    np.testing.assert_allclose(out.group_norms[1], norms_by_hand([["head"]])[0] * np.asarray(MASK), rtol=1e-4)


def test_groups_of_other_parameters_are_refused():
    with pytest.raises(InputError, match="2 leaves, and the parameters have 6"):
        clipped_grad(loss, norm_groups=NormGroups(("a",), (0, 0)))(PARAMS, BATCH, MASK)


def test_one_array_is_one_group():
    assert by_module(jnp.zeros(3)) == NormGroups(("parameters",), (0,))
    assert by_module({"b": [1.0, 2.0], "a": 3.0}) == NormGroups(("a", "b"), (0, 1, 1))
