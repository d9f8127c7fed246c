"""The sum of clipped per-example gradients of any JAX loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from dpscale.clipping.bounds import ROUNDING_SLACK as ROUNDING_SLACK
from dpscale.clipping.bounds import Bound as Bound
from dpscale.clipping.bounds import Flat as Flat
from dpscale.clipping.bounds import Normalized as Normalized
from dpscale.clipping.bounds import PerGroup as PerGroup
from dpscale.clipping.bounds import PerPattern as PerPattern
from dpscale.clipping.bounds import as_bound
from dpscale.clipping.engine import clipped_sum
from dpscale.clipping.example import ClippedSum as ClippedSum
from dpscale.clipping.example import Problem, check_scalar
from dpscale.clipping.explain import Explanation as Explanation
from dpscale.clipping.explain import explanation
from dpscale.clipping.groups import NormGroups as NormGroups
from dpscale.clipping.groups import by_module as by_module
from dpscale.clipping.reference import materialize
from dpscale.clipping.split import check_loss, split_backward
from dpscale.errors import InputError

Method = Literal["auto", "bookkeeping", "ghost", "materialize"]


def clipped_grad(
    loss_fn: Callable[..., Any],
    clip_norm: float | None = None,
    method: Method = "auto",
    *,
    bound: Bound | None = None,
    has_aux: bool = False,
    trainable: Any = None,
    norm_groups: NormGroups | None = None,
) -> "ClippedGrad":
    """A function that gives the sum over a batch of each example's clipped gradient of `loss_fn`.

    `loss_fn(params, example)`, or `loss_fn(params, example, key)` when keys are given, is the loss of ONE example
    (no batch axis): a float scalar, or `(scalar, aux)` with `has_aux=True`. Any JAX code will do.
    `clip_norm` (default 1.0) is short for `bound=Flat(clip_norm)`; see `PerGroup` and `Normalized`.
    `trainable` is a prefix pytree of bools; the gradient of a False or non-float leaf is None.
    `norm_groups`, as `by_module(params)` makes them, asks for the norms of groups of leaves too.

    Methods give the same sums up to rounding: "auto" lets the engine decide, "bookkeeping" takes one backward pass,
    "ghost" two (least memory), "materialize" writes out every example's gradient.

    Guarantees: an example's contribution has norm at most `bound.max_norm * (1 + ROUNDING_SLACK)`; a masked row, or
    one whose loss or gradient is not finite, contributes exactly zero, whatever it holds. No collective is used.

    | clip norm | gradient | contribution |
    | --- | --- | --- |
    | C | norm <= C | the gradient |
    | C | norm > C | C * gradient / norm |
    | 0 | any | 0 |
    | inf | finite | the gradient |
    | any | 0 | 0 |
    | any | NaN, inf, or a norm above 1.8e19, its own or that of a layer's cotangent | 0, and `finite` is False |

    Raises: InputError for an unknown method, a bad bound, or parameters or a mask that do not fit.
    """
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: choose one of {', '.join(get_args(Method))}")
    return ClippedGrad(loss_fn, as_bound(clip_norm, bound), method, has_aux, trainable, norm_groups)


class ClippedGrad:
    """`clipped(params, batch, mask, keys=None) -> ClippedSum`; see `clipped_grad`."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        bound: Bound,
        method: Method,
        has_aux: bool,
        trainable: Any,
        norm_groups: NormGroups | None,
    ):
        self.loss_fn = loss_fn
        self.bound = bound
        self.method: Method = method
        self.has_aux = has_aux
        self.trainable = trainable
        self.norm_groups = norm_groups

    def __call__(self, params: Any, batch: Any, mask: jax.Array, keys: jax.Array | None = None) -> ClippedSum:
        """`batch`: pytree with leading axis B; `mask`: bool[B], False for padding; `keys`: leading axis B or None."""
        flat, treedef = jax.tree.flatten(params)
        problem, places = self._problem(params, batch, mask, keys)
        if self.method == "materialize":
            check_loss(problem)
            result = materialize(problem)
        else:
            result = clipped_sum(problem, self.method)
        grads: list[Any] = [None] * len(flat)
        for place, grad in zip(places, result.grad_sum, strict=True):
            grads[place] = grad
        return replace(result, grad_sum=treedef.unflatten(grads))

    def explain(self, params: Any, batch: Any, keys: jax.Array | None = None) -> Explanation:
        """Per parameter: the route, sizes, operations and bytes for this batch. Print it."""
        rows = jax.tree.leaves((batch, keys))[0].shape[0]
        problem, _ = self._problem(params, batch, jnp.ones(rows, bool), keys)
        return explanation(split_backward(problem, self.method), problem)

    def _problem(self, params: Any, batch: Any, mask: Any, keys: Any) -> tuple[Problem, list[int]]:
        params, batch, mask, keys = _vary_alike((params, batch, jnp.asarray(mask), keys))
        _check_rows(batch, mask, keys)
        _check_sharding((params, batch, mask, keys))
        flat, treedef = jax.tree.flatten(params)
        flat = [jnp.asarray(leaf) for leaf in flat]
        groups = self.bound.groups(params)
        places = [j for j, on in enumerate(_trainable_leaves(self.trainable, params, flat)) if on]
        if not places:
            raise InputError("no parameter is trainable: there must be a float leaf that `trainable` does not freeze")
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]

        def loss(leaves, row):
            full = list(flat)
            for place, leaf in zip(places, leaves, strict=True):
                full[place] = leaf
            out = self.loss_fn(treedef.unflatten(full), *row)
            value, aux = out if self.has_aux else (out, None)
            check_scalar(value := jnp.asarray(value))
            return value, aux

        rows = (batch,) if keys is None else (batch, keys)
        leaves, names = [flat[j] for j in places], [paths[j] for j in places]
        problem = Problem(loss, leaves, names, rows, mask, self.bound, [groups[j] for j in places])
        return self._with_norm_groups(problem, places, len(flat)), places

    def _with_norm_groups(self, problem: Problem, places: list[int], num_leaves: int) -> Problem:
        asked = self.norm_groups
        if asked is None:
            return problem
        if len(asked.of_leaf) != num_leaves:
            raise InputError(
                f"norm_groups has a group for {len(asked.of_leaf)} leaves, and the parameters have {num_leaves}: make "
                "it for these parameters"
            )
        of_leaf = [asked.of_leaf[j] for j in places]
        return replace(problem, norm_groups=of_leaf, num_norm_groups=len(asked.names))


def _trainable_leaves(trainable: Any, params: Any, flat: list[jax.Array]) -> list[bool]:
    if trainable is None:
        chosen = [True] * len(flat)
    else:
        try:
            chosen = jax.tree.leaves(jax.tree.broadcast(trainable, params))
        except ValueError as error:
            raise InputError(f"trainable is not a prefix of the parameters' pytree: {error}") from error
    return [bool(on) and jnp.issubdtype(leaf.dtype, jnp.floating) for on, leaf in zip(chosen, flat, strict=True)]


def _check_rows(batch: Any, mask: jax.Array, keys: Any) -> None:
    if mask.ndim != 1 or mask.dtype != jnp.bool_ or mask.shape[0] == 0:
        raise InputError(f"mask is {mask.dtype}{list(mask.shape)}: it must be bool[B] with B >= 1")
    for path, x in jax.tree_util.tree_flatten_with_path((batch, keys))[0]:
        if jnp.shape(x)[:1] != mask.shape:
            raise InputError(
                f"{'keys' if path[0].idx else 'batch'}{jax.tree_util.keystr(path[1:])} has shape {jnp.shape(x)} "
                f"and the mask {mask.shape}: every leaf needs the same leading axis B"
            )


def _check_sharding(arguments: Any) -> None:
    for x in jax.tree.leaves(arguments):
        if any(axes is not None for axes in jax.typeof(x).sharding.spec):
            raise InputError(
                f"an array is sharded explicitly ({jax.typeof(x)}): products of the rewritten backward pass would need "
                "shardings that the loss does not name: use a mesh of AxisType.Auto, or shard rows by jax.shard_map "
                "and add the sums up by psum"
            )


def _vary_alike(tree: Any) -> Any:
    """Inside shard_map: marks every leaf as varying over the axes over which any of them varies.

    Without it, the gradient with respect to replicated parameters would be summed over the devices by jax itself.
    """
    everywhere = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(everywhere - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying_axes(x: Any) -> frozenset[str]:
    aval = jax.typeof(x)
    axes = aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else getattr(aval, "vma", ())
    return frozenset(axes)
