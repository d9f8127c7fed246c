"""Programs as equations: a traced program computes what the function computes, nested, pruned or exposed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify

from dpscale.clipping import clipped_grad
from dpscale.clipping.equations import Constant, expose, moving_names, run, subprogram, walk
from dpscale.clipping.jaxpr import CHECKED_VERSIONS, trace
from dpscale.errors import InputError


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def version(text):
    return tuple(int(part) for part in text.split(".")[:3])


def test_this_jax_is_one_that_the_programs_were_checked_with():
    """A newer one may work: run all of tests/test_clipping_*.py with it, then add it to CHECKED_VERSIONS."""
    assert version(CHECKED_VERSIONS[0])[:2] == (0, 10)
    assert list(map(version, CHECKED_VERSIONS)) == sorted(map(version, CHECKED_VERSIONS))
    assert version(jax.__version__) >= version(CHECKED_VERSIONS[0])
    if version(jax.__version__) > version(CHECKED_VERSIONS[-1]):
        warnings.warn(f"jax {jax.__version__} is newer than {CHECKED_VERSIONS[-1]}, the last one checked", stacklevel=1)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (twice(x), None), lambda _, g: (2 * g,))


@jax.custom_jvp
def soft(x):
    return jnp.logaddexp(x, 0.0)


soft.defjvp(lambda primals, tangents: (soft(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]))


def nested(w, x):
    @jax.checkpoint
    def block(h):
        return jnp.tanh(jax.jit(lambda h: soft(twice(h @ w)))(h))

    h, extra = lax.scan(lambda h, t: (block(h) + t, jnp.sum(h)), x[0], x)
    return jnp.sum(h) + jnp.sum(extra) ** 2


def test_nested_programs_are_inlined_and_compute_the_same():
    w, x = normal(0, 4, 4), normal(1, 3, 4)
    program, _ = trace(jax.value_and_grad(nested), w, x)
    called = {"jit", "pjit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call", "closed_call"}
    assert called.isdisjoint(equation.operation for equation in walk(program))
    assert program.checkpointed
    expected = jax.value_and_grad(nested)(w, x)
    for mine, theirs in zip(run(program, w, x), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_names_inside_a_scan_come_out_stacked_and_nothing_is_computed_in_vain():
    def fun(w, x):
        return lax.scan(lambda h, t: (jnp.tanh(h @ w) + t, jnp.cos(h)), jnp.ones(4), x)

    w, x = normal(0, 4, 4), normal(1, 3, 4)
    program, _ = trace(fun, w, x)
    (scan,) = [equation for equation in program.equations if equation.body is not None]
    product = next(equation for equation in scan.body.equations if equation.operation == "dot_general")
    short = expose(program, [product.outputs[0]])
    assert all(equation.operation != "cos" for equation in walk(short))
    states = [jnp.ones(4)]
    for t in x:
        states.append(jnp.tanh(states[-1] @ w) + t)
    np.testing.assert_allclose(run(short, w, x)[0], jnp.stack([h @ w for h in states[:-1]]), rtol=1e-5)


def test_names_move_with_the_inputs_that_they_depend_on_also_through_carries():
    def fun(w, x):
        carried, _ = lax.scan(lambda c, t: ((c[0] @ w, c[1] + t), None), (jnp.ones(4), jnp.zeros(4)), x)
        return (*carried, w @ w)

    program, _ = trace(fun, normal(0, 4, 4), normal(1, 3, 4))
    moving = moving_names(program, program.inputs[1:])
    assert [name in moving for name in program.outputs] == [False, True, False]


def test_a_part_of_a_program_starts_at_any_of_its_values():
    program, _ = trace(lambda x: jnp.sum(jnp.exp(jnp.sin(x)) * 3.0), normal(0, 5))
    middle = next(equation.outputs[0] for equation in program.equations if equation.operation == "sin")
    part = subprogram(program, [middle], program.outputs)
    assert all(equation.operation != "sin" for equation in part.equations)
    np.testing.assert_allclose(run(part, jnp.zeros(5))[0], 15.0)


def test_arrays_that_a_function_closes_over_are_constants_and_literals_can_be_looked_at():
    table = normal(3, 4)
    program, _ = trace(lambda x: x * 2.0 + table, normal(0, 4))
    constants = [x for equation in program.equations for x in equation.inputs if isinstance(x, Constant)]
    assert [float(x.literal) for x in constants if x.literal is not None and x.literal.ndim == 0] == [2.0]
    assert any(x.shape == (4,) for x in constants)
    np.testing.assert_allclose(run(program, jnp.ones(4))[0], 2 + table, rtol=1e-6)


@pytest.mark.parametrize(("method", "passes"), [("bookkeeping", 1), ("ghost", 2), ("materialize", 1)])
def test_what_a_loss_does_besides_its_value_is_done(method, passes):
    """Callbacks and checks have no result that anything reads, and must not go for that reason."""
    seen, w, x = [], normal(0, 5, 4), normal(1, 3, 2, 5)

    def loss(w, x):
        checkify.check(jnp.all(x < 100), "too large")
        h, _ = lax.scan(lambda h, t: (jnp.tanh(t @ w) + h, None), jnp.zeros(4), x)
        return jnp.sum(h)

    def told(w, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0])
        return jnp.sum(lax.scan(lambda h, t: (jnp.tanh(t @ w) + h, None), jnp.zeros(4), x)[0])

    clipped_grad(told, method=method)(w, x, jnp.ones(3, bool))
    jax.effects_barrier()
    assert sorted(seen) == sorted([float(v) for v in x[:, 0, 0]] * passes)
    checked = checkify.checkify(jax.jit(clipped_grad(loss, method=method)))
    assert checked(w, x, jnp.ones(3, bool))[0].get() is None
    assert "too large" in (checked(w, x.at[1].set(1e5), jnp.ones(3, bool))[0].get() or "")


def test_what_is_read_from_a_reference_may_follow_the_example():
    def fun(w, x):
        total = jax.new_ref(jnp.zeros(4))
        total[...] += x @ w
        return total[...] * 2

    program, _ = trace(fun, normal(0, 3, 4), normal(1, 3))
    assert program.outputs[0] in moving_names(program, program.inputs[1:])


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_a_step_whose_batch_size_is_left_open_can_be_exported(method):
    w, x = normal(0, 40, 40), normal(1, 6, 3, 40)
    clipped = clipped_grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)), method=method)
    step = jax.jit(lambda w, x, mask: clipped(w, x, mask).grad_sum)
    (rows,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((40, 40), "float32"), ((rows, 3, 40), "float32"), ((rows,), "bool"))
    ]
    found = export.export(step)(*shapes).call(w, x, jnp.ones(6, bool))
    np.testing.assert_allclose(found, step(w, x, jnp.ones(6, bool)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_equations_run_under_the_settings_that_the_loss_makes(method):
    """Keys drew other numbers."""

    def loss(w, x, key):
        with jax.threefry_partitionable(not jax.config.values["jax_threefry_partitionable"]):
            noise = jax.random.normal(key, x.shape)
        return jnp.sum(jnp.sin((x + noise) @ w))

    arguments = normal(1, 5, 6), normal(2, 4, 3, 5), jnp.ones(4, bool), jax.random.split(jax.random.key(3), 4)
    out, expected = (jax.jit(clipped_grad(loss, 0.5, name))(*arguments) for name in (method, "materialize"))
    np.testing.assert_allclose(out.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(out.norms, expected.norms, rtol=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_nothing_rests_on_ranks_that_are_promoted(method):
    def loss(w, x):
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    with jax.numpy_rank_promotion("raise"):
        clipped_grad(loss, 0.5, method)(normal(1, 3, 5, 5), normal(2, 4, 5), jnp.ones(4, bool))
        clipped_grad(loss, 0.5, method)(normal(1, 3, 5, 5), normal(2, 4, 7, 5), jnp.ones(4, bool))


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_what_is_sharded_explicitly_is_refused(method):
    spec, kinds = jax.sharding.PartitionSpec, (jax.sharding.AxisType.Explicit,)
    clipped, mask = clipped_grad(lambda w, x: jnp.sum(x @ w), 0.5, method), jnp.ones(4, bool)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=kinds, devices=jax.devices()[:2])):
        rows, weight = normal(2, 4, 5), normal(1, 5, 6)
        with pytest.raises(InputError, match=r"float32\[4@data,5\]"):
            clipped(weight, jax.device_put(rows, spec("data")), mask)
        with pytest.raises(InputError, match=r"float32\[5,6@data\]"):
            clipped(jax.device_put(weight, spec(None, "data")), rows, mask)
        assert clipped(weight, rows, mask).finite.all()


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
@pytest.mark.parametrize("axes", [("model",), (None, "model")])
def test_weights_may_be_sharded_automatically(method, axes):
    kinds, weight, rows = (jax.sharding.AxisType.Auto,), normal(1, 6, 8), normal(2, 4, 3, 6)
    clipped = jax.jit(clipped_grad(lambda w, x: jnp.sum(jnp.sin(x @ w)), 0.5, method))
    expected = clipped(weight, rows, jnp.arange(4) != 1)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=kinds, devices=jax.devices()[:2])):
        placed = jax.device_put(weight, jax.sharding.PartitionSpec(*axes))
        out = clipped(placed, rows, jnp.arange(4) != 1)
    assert len(placed.sharding.device_set) == 2
    np.testing.assert_allclose(out.grad_sum, expected.grad_sum, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.norms, expected.norms, rtol=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_a_loss_may_be_sharded_within(method):
    """What jax.shard_map binds to is neither a list nor a tuple."""
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def loss(w, x):
        def part(x, w):
            return lax.psum(jnp.sum(jnp.sin(x @ w)), "model")

        return jax.shard_map(part, mesh=mesh, in_specs=(spec(), spec(None, "model")), out_specs=spec())(x, w)

    arguments = normal(1, 5, 6), normal(2, 4, 3, 5), jnp.ones(4, bool)
    out = jax.jit(clipped_grad(loss, 0.5, method))(*arguments)
    expected = jax.jit(clipped_grad(lambda w, x: jnp.sum(jnp.sin(x @ w)), 0.5, method))(*arguments)
    np.testing.assert_allclose(out.grad_sum, expected.grad_sum, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out.norms, expected.norms, rtol=1e-4)
