"""The replica check sees any difference between devices, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_fixtures import mesh_of

from dpscale.errors import DivergedError
from dpscale.mesh import place_replicated, replicated
from dpscale.replicas import ReplicaCheck


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((5, 4)).astype(np.float32), "b": rng.standard_normal(8).astype(np.float32)}


def with_one_device_different(mesh, params, change):
    """Replicated in name, but device 5 holds `change(params)`: what a corrupted replica looks like."""
    odd = change(jax.tree.map(np.copy, params))

    def leaf(value, other):
        shards = [jax.device_put(other if place == 5 else value, d) for place, d in enumerate(mesh.devices.flat)]
        return jax.make_array_from_single_device_arrays(value.shape, replicated(mesh), shards)

    return jax.tree.map(leaf, params, odd)


def one_bit(params):
    params["b"].view(np.uint32)[3] ^= 1
    return params


def one_sign(params):
    params["a"][2, 2] *= -1
    return params


def two_signs(params):
    params["a"][[0, 4], [1, 3]] *= -1
    return params


def all_signs(params):
    return {name: -leaf for name, leaf in params.items()}


def exchanged_elements(params):
    params["b"][[1, 2]] = params["b"][[2, 1]]
    return params


def exchanged_across_leaves(params):
    a, b = params["a"][0, 0], params["b"][0]
    params["a"][0, 0], params["b"][0] = b, a
    return params


def moved_along(params):
    return {name: np.roll(leaf, 1) for name, leaf in params.items()}


def nan(params):
    params["a"][0, 0] = np.nan
    return params


CHANGES = [one_bit, one_sign, two_signs, all_signs, exchanged_elements, exchanged_across_leaves, moved_along, nan]


def test_equal_replicas_pass_whatever_they_hold():
    mesh = mesh_of(8)
    check = ReplicaCheck(mesh)
    check(place_replicated(mesh, parameters()))
    check(place_replicated(mesh, nan(parameters())))
    check(place_replicated(mesh, {"low": jnp.ones((3,), jnp.bfloat16)}))


@pytest.mark.parametrize("change", CHANGES)
def test_one_device_that_differs_is_seen(change):
    mesh = mesh_of(8)
    with pytest.raises(DivergedError, match="different parameters"):
        ReplicaCheck(mesh)(with_one_device_different(mesh, parameters(), change))


def test_a_difference_of_any_single_bit_is_seen():
    mesh = mesh_of(8)
    check = ReplicaCheck(mesh)
    params = {"w": np.array([1.5, -0.25], np.float32)}
    for bit in range(32):

        def flip(p, bit=bit):
            p["w"].view(np.uint32)[1] ^= np.uint32(1 << bit)
            return p

        with pytest.raises(DivergedError):
            check(with_one_device_different(mesh, params, flip))


def test_the_check_moves_no_parameters_between_devices():
    mesh = mesh_of(8)
    program = ReplicaCheck(mesh)._checksums.lower(place_replicated(mesh, parameters())).compile().as_text()
    assert not any(name in program for name in ("all-reduce", "all-gather", "collective-permute", "all-to-all"))
