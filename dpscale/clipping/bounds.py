"""Bounds on what one example may contribute: flat, per group of parameters, normalised."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.errors import InputError
from dpscale.privacy import sensitivity

ROUNDING_SLACK = sensitivity.SLACK
"""A contribution's true norm is at most `max_norm * (1 + ROUNDING_SLACK)`: the room that the noise is scaled with."""

MAX_FACTOR = 2.0**63
"""Times any float32 whose square is finite, still finite."""


class Bound(Protocol):
    """How per-example norms become per-example factors."""

    @property
    def max_norm(self) -> float:
        """Largest Euclidean norm of one example's contribution to the sum over all leaves (a plain float)."""
        ...

    def groups(self, params: Any) -> list[int]:
        """The group number of each leaf of `params`, in flattening order."""
        ...

    def factors(self, norms: jax.Array) -> jax.Array:
        """Factors in [0, MAX_FACTOR], f[G, B], from the groups' norms, f[G, B]."""
        ...


@dataclass(frozen=True)
class Flat:
    """Scale each example's gradient to at most `clip_norm`: min(1, C / norm) (Abadi et al. 2016, section 3).

    Edge cases: 0 gives zero contributions, inf leaves finite gradients as they are.
    Raises InputError for a negative or NaN norm.
    """

    clip_norm: float

    def __post_init__(self):
        _check_norm(self.clip_norm)

    @property
    def max_norm(self) -> float:
        return float(self.clip_norm)

    def groups(self, params: Any) -> list[int]:
        return [0] * len(jax.tree.leaves(params))

    def factors(self, norms: jax.Array) -> jax.Array:
        return _clip_factors(norms, [self.clip_norm])


@dataclass(frozen=True)
class PerGroup:
    """Clip each group of leaves to its own norm; the whole contribution is at most sqrt(sum of C_g^2).

    `clip_norms` is a prefix of the parameters' pytree whose leaves are floats, for example
    `{"encoder": 0.5, "head": 1.0}`; each float bounds the joint norm of all leaves below it.
    Edge cases: as for `Flat`, group by group. Raises InputError where it is no prefix of the parameters.
    """

    clip_norms: Any

    def __post_init__(self):
        if not jax.tree.leaves(self.clip_norms):
            raise InputError("PerGroup got no clip norm at all: give a prefix of the parameters' pytree with floats")
        for norm in jax.tree.leaves(self.clip_norms):
            _check_norm(norm)

    @property
    def max_norm(self) -> float:
        return float(np.sqrt(sum(float(norm) ** 2 for norm in jax.tree.leaves(self.clip_norms))))

    def groups(self, params: Any) -> list[int]:
        try:
            subtrees = jax.tree.structure(self.clip_norms).flatten_up_to(params)
        except ValueError as error:
            raise InputError(f"clip_norms is not a prefix of the parameters' pytree: {error}") from error
        return [group for group, subtree in enumerate(subtrees) for _ in jax.tree.leaves(subtree)]

    def factors(self, norms: jax.Array) -> jax.Array:
        return _clip_factors(norms, jax.tree.leaves(self.clip_norms))


@dataclass(frozen=True)
class PerPattern:
    """`PerGroup` for groups that patterns of parameter paths make: ((pattern, C_g), ..).

    A leaf belongs to the first pattern that matches its path, as "Dense_0/kernel"; `*` stands for any text, slashes
    too, `?` for one character (fnmatch). The whole contribution is at most sqrt(sum of C_g^2).
    Raises InputError where a leaf matches no pattern, or a pattern is left without a leaf: its share of the noise would
    be wasted.
    """

    clip_groups: tuple[tuple[str, float], ...]

    def __post_init__(self):
        if not self.clip_groups:
            raise InputError('no clip groups: give at least one pattern with its norm, {"*" = 1.0}')
        for _, norm in self.clip_groups:
            _check_norm(norm)

    @property
    def max_norm(self) -> float:
        return float(np.sqrt(sum(float(norm) ** 2 for _, norm in self.clip_groups)))

    def groups(self, params: Any) -> list[int]:
        patterns = [pattern for pattern, _ in self.clip_groups]
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        found = [next((n for n, p in enumerate(patterns) if fnmatchcase(path, p)), None) for path in paths]
        if None in found:
            lost = [path for path, group in zip(paths, found, strict=True) if group is None]
            raise InputError(
                f"no pattern of privacy.clip_groups ({', '.join(patterns)}) matches {', '.join(lost)}: every parameter "
                'needs a norm; end with "*" for the rest'
            )
        empty = [pattern for group, pattern in enumerate(patterns) if group not in found]
        if empty:
            raise InputError(
                f"privacy.clip_groups {', '.join(empty)}: no parameter is left for it. The first pattern that matches "
                f"counts; parameters are {', '.join(paths[:20])}"
            )
        return [group for group in found if group is not None]

    def factors(self, norms: jax.Array) -> jax.Array:
        return _clip_factors(norms, [norm for _, norm in self.clip_groups])


@dataclass(frozen=True)
class Normalized:
    """Scale every example's gradient to nearly `clip_norm`: C / (norm + gamma), "automatic clipping".

    A zero gradient stays zero because gamma > 0. Source: Bu et al. 2022, arXiv 2206.07136, section 4.
    Raises InputError unless 0 <= clip_norm < inf and 0 < gamma < inf, and clip_norm / gamma <= 2**63: a factor may
    meet any number of which the square is finite.
    """

    clip_norm: float
    gamma: float = 0.01

    def __post_init__(self):
        _check_norm(self.clip_norm)
        if not (0 < self.gamma < float("inf") and self.clip_norm < float("inf")):
            raise InputError(
                f"Normalized(clip_norm={self.clip_norm}, gamma={self.gamma}): both must be finite and gamma > 0"
            )
        if self.clip_norm / self.gamma > MAX_FACTOR:
            raise InputError(
                f"Normalized(clip_norm={self.clip_norm}, gamma={self.gamma}): factors reach clip_norm / gamma, which "
                f"must not exceed {MAX_FACTOR:.3g}, or products with them overflow: choose a larger gamma"
            )

    @property
    def max_norm(self) -> float:
        return float(self.clip_norm)

    def groups(self, params: Any) -> list[int]:
        return [0] * len(jax.tree.leaves(params))

    def factors(self, norms: jax.Array) -> jax.Array:
        return _round_down(self.clip_norm, norms.dtype) / (norms + jnp.asarray(self.gamma, norms.dtype))


def as_bound(clip_norm: float | None, bound: Bound | None) -> Bound:
    """The bound that the two keywords of `clipped_grad` mean; the default is Flat(1.0)."""
    if bound is None:
        return Flat(1.0 if clip_norm is None else clip_norm)
    if clip_norm is not None:
        raise InputError(f"both clip_norm={clip_norm} and bound={bound} were given: give one of them")
    return bound


def _check_norm(norm: float) -> None:
    if isinstance(norm, jax.core.Tracer) or not np.isscalar(norm) or not float(norm) >= 0:  # type: ignore[arg-type]
        raise InputError(f"clip_norm={norm!r}: a clip norm is a plain number >= 0, known before the step is compiled")


def _round_down(value: float, dtype) -> jax.Array:
    """`value` in `dtype`, never above it: a bound must not grow by rounding."""
    rounded = np.asarray(value, dtype)
    return jnp.asarray(np.nextafter(rounded, np.zeros_like(rounded)) if float(rounded) > value else rounded)


def _clip_factors(norms: jax.Array, clip_norms: list[float]) -> jax.Array:
    clip_norms = clip_norms[: norms.shape[0]]  # groups after the last trainable leaf's have no norm
    limits = jnp.stack([_round_down(float(norm), norms.dtype) for norm in clip_norms])[:, None]
    return jnp.minimum(1, limits / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
