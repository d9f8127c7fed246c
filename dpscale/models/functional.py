"""Any flax module, linen or nnx, as (params, apply): the form in which the rest of dpscale sees a model."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from dpscale.errors import InputError

_TRAIN_ARGUMENTS = {"train": True, "training": True, "is_training": True, "deterministic": False}


class Apply(Protocol):
    """`apply(params, features, key)`: one example's output. key None means evaluation: no dropout."""

    def __call__(self, params: Any, features: jax.Array, key: jax.Array | None) -> Any: ...


@dataclass(frozen=True)
class Functional:
    """A model as a pytree of trainable parameters and a pure function of them.

    `apply(params, features, key)` takes ONE example (no batch axis), and a key for what is random in training
    or None for evaluation. Map it with `jax.vmap` for a batch: then no operation can reach across examples.
    """

    params: Any
    apply: Apply

    @property
    def num_parameters(self) -> int:
        """How many trainable numbers there are."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


def seed_key(seed: int) -> jax.Array:
    """A threefry key from all 64 bits of a public seed; for initial weights only, never for noise or
    sampling."""
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def as_functional(module: Any, example: Any, *, seed: int = 0, batch_axis: bool = False) -> Functional:
    """(params, apply) of a flax module.

    `module`: a linen module; an nnx module, whose present parameters are the initial ones; or a function from
    `nnx.Rngs` to an nnx module. `example`: one example's features as the model sees them (after the
    transform), an array or a ShapeDtypeStruct. `seed`: public, 64 bits, of the initial weights. `batch_axis`:
    the module insists on a leading batch axis; it is then called with one of length 1.

    Guarantees: params depend on (module, example's shape and dtype, seed) alone.
    Raises: InputError for a module with batch statistics, and for what is not a flax module.
    """
    shape = jax.ShapeDtypeStruct(example.shape, example.dtype)
    if batch_axis:
        shape = jax.ShapeDtypeStruct((1, *shape.shape), shape.dtype)
    if isinstance(module, linen.Module):
        params, apply = _linen(module, shape, seed)
    else:
        if not isinstance(module, nnx.Module) and callable(module):
            module = module(nnx.Rngs(seed_key(seed)))
        if not isinstance(module, nnx.Module):
            raise InputError(
                f"model of type {type(module).__name__} is not a flax module: give a linen module, an nnx "
                "module, or a "
                "function that takes nnx.Rngs and returns an nnx module"
            )
        params, apply = _nnx(module)
    return Functional(params, _with_batch_axis(apply) if batch_axis else apply)


def check_per_example(has_batch_statistics: bool, name: str) -> None:
    """Refuses a model whose output for one example depends on the other examples of the batch.

    Raises: InputError that names GroupNorm.
    """
    if has_batch_statistics:
        raise InputError(
            f"the model {name} has batch statistics (BatchNorm), but per-example clipping needs each "
            "example's gradient to "
            "depend on that example alone: replace BatchNorm with GroupNorm (or LayerNorm)"
        )


def _linen(module: linen.Module, shape: jax.ShapeDtypeStruct, seed: int) -> tuple[Any, Apply]:
    flag = _train_argument(type(module).__call__)

    def initialise(key: jax.Array) -> Any:
        weights_key, dropout_key = jax.random.split(key)
        rngs = {"params": weights_key, "dropout": dropout_key}
        return module.init(rngs, jnp.zeros(shape.shape, shape.dtype), **flag(False))

    # Shapes first: a refused model costs no initialisation.
    abstract = jax.eval_shape(initialise, seed_key(seed))
    check_per_example("batch_stats" in abstract, type(module).__name__)
    # It runs once, so on a CPU it is not worth optimising: seconds less to compile.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    variables = jax.jit(initialise, compiler_options=quick)(seed_key(seed))
    params = variables.get("params", {})
    constants = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, features: jax.Array, key: jax.Array | None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params, **constants}, features, rngs=rngs, **flag(key is not None))

    return params, apply


def _nnx(module: nnx.Module) -> tuple[Any, Apply]:
    graph, state, random, constants = nnx.split(module, nnx.Param, nnx.RngState, ...)
    check_per_example(_holds_batch_statistics(constants), type(module).__name__)
    leaves, structure = jax.tree.flatten(state)
    # Which leaf sits where, as nested dicts of strings: list positions become keys that any checkpoint can
    # hold.
    positions = _with_string_keys(nnx.to_pure_dict(jax.tree.unflatten(structure, range(len(leaves)))))
    flag = _train_argument(type(module).__call__)

    def apply(params: Any, features: jax.Array, key: jax.Array | None) -> Any:
        values = dict(zip(jax.tree.leaves(positions), jax.tree.leaves(params), strict=True))
        trained = jax.tree.unflatten(structure, [values[i] for i in range(len(values))])
        model = nnx.merge(graph, trained, random if key is None else _rekeyed(random, key), constants)
        if key is None:
            model.eval()
        else:
            model.train()
        return model(features, **flag(key is not None))  # pyright: ignore[reportCallIssue]

    return jax.tree.map(lambda position: leaves[position], positions), apply


def _holds_batch_statistics(state: nnx.State) -> bool:
    return any(isinstance(variable, nnx.BatchStat) for _, variable in nnx.to_flat_state(state))


def _with_string_keys(tree: Any) -> Any:
    return {str(k): _with_string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _rekeyed(random: nnx.State, key: jax.Array) -> nnx.State:
    """The random state with every stored key replaced by one derived from `key`, so that a draw depends on it
    alone."""
    leaves, structure = jax.tree.flatten(random)
    fresh = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


def _train_argument(call: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """What to pass so that the module trains or evaluates, in whichever of flax's conventions it is
    written."""
    parameters = inspect.signature(call).parameters
    for name, when_training in _TRAIN_ARGUMENTS.items():
        if name in parameters:
            return lambda training, name=name, yes=when_training: {name: training == yes}
    return lambda training: {}


def _with_batch_axis(apply: Apply) -> Apply:
    def call(params: Any, features: jax.Array, key: jax.Array | None) -> Any:
        return jax.tree.map(lambda x: x[0], apply(params, features[None], key))

    return call
