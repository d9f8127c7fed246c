"""The replica check sees any difference between devices, and nothing else."""

from __future__ import annotations

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_fixtures import mesh_of

from dpscale.errors import DivergedError
from dpscale.mesh import place_replicated, place_rows, replicated
from dpscale.replicas import ReplicaCheck, SentCheck

DRAW = bytes(range(16))


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
    for params in (parameters(), nan(parameters()), {"low": jnp.ones((3,), jnp.bfloat16)}):
        assert len(check.send(place_replicated(mesh, params), DRAW).agreed()) == 4


@pytest.mark.parametrize("change", CHANGES)
def test_one_device_that_differs_is_seen(change):
    mesh = mesh_of(8)
    with pytest.raises(DivergedError, match=r"the parameters of device\(s\) \[5\] \(process\(es\) \[0\]\) differ"):
        ReplicaCheck(mesh).send(with_one_device_different(mesh, parameters(), change), DRAW).agreed()


def test_a_difference_of_any_single_bit_is_seen():
    mesh = mesh_of(8)
    check = ReplicaCheck(mesh)
    params = {"w": np.array([1.5, -0.25], np.float32)}
    for bit in range(32):

        def flip(p, bit=bit):
            p["w"].view(np.uint32)[1] ^= np.uint32(1 << bit)
            return p

        with pytest.raises(DivergedError):
            check.send(with_one_device_different(mesh, params, flip), DRAW).agreed()


def test_the_checksum_is_that_of_the_parameters_at_the_time_of_sending():
    """They are donated to the step that is sent next, as in the loop."""
    mesh = mesh_of(8)
    check = ReplicaCheck(mesh)
    update = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    params = place_replicated(mesh, parameters())
    sent = check.send(params, DRAW)
    later = check.send(update(params), DRAW)
    assert all(leaf.is_deleted() for leaf in params.values())
    alone = check.send(place_replicated(mesh, parameters()), DRAW)
    assert sent.agreed() == alone.agreed() != later.agreed()


def test_a_process_with_another_draw_is_named():
    """Eight devices of four processes, of which the third draws its own batch."""
    mesh = mesh_of(8)
    words = np.tile(np.frombuffer(DRAW, "<u4"), (8, 1))
    words[4:6, 3] ^= 1
    gathered = ReplicaCheck(mesh)._gather(place_replicated(mesh, parameters()), place_rows(mesh, words))
    with pytest.raises(DivergedError, match=r"the draw of device\(s\) \[4, 5\] \(process\(es\) \[2\]\) differ"):
        SentCheck(gathered, (0, 0, 1, 1, 2, 2, 3, 3)).agreed()


def test_every_bit_of_the_draw_is_compared():
    mesh = mesh_of(2)
    check, params = ReplicaCheck(mesh), place_replicated(mesh_of(2), parameters())
    rows = [np.asarray(check.send(params, (1 << bit).to_bytes(16, "little")).gathered)[0, 1:] for bit in range(128)]
    assert len({row.tobytes() for row in rows}) == 128


def test_the_only_collective_of_the_check_gathers_twenty_bytes_a_device():
    mesh = mesh_of(8)
    arguments = place_replicated(mesh, parameters()), place_rows(mesh, np.zeros((8, 4), np.uint32))
    program = ReplicaCheck(mesh)._gather.lower(*arguments).compile().as_text()
    assert program is not None
    assert re.findall(r"(\S+) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)\(", program) == [
        (mock.ANY, "all-gather")
    ]
    assert re.search(r"u32\[8,5\]\S* all-gather\(|u32\[40\]\S* all-gather\(", program)
