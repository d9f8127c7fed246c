"""Groups of leaves whose per-example gradient norms are reported beside the whole ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class NormGroups:
    """Names of groups, and the group of each leaf of the parameters in flattening order.

    `limits`: the norm that each group is clipped to; None where the whole gradient is clipped at once.
    """

    names: tuple[str, ...]
    of_leaf: tuple[int, ...]
    limits: tuple[float, ...] | None = None

    @property
    def num_sums(self) -> int:
        """Length of `sums`."""
        return len(self.names) * (1 if self.limits is None else 2)

    def sums(self, norms: jax.Array, counted: jax.Array) -> jax.Array:
        """f32[num_sums]: each group's norms, f32[G, B], over the rows `counted`, bool[B]; then how many are too long.

        Sensitive: no noise protects it.
        """
        sums = jnp.sum(jnp.where(counted, norms, 0.0), axis=1)
        if self.limits is None:
            return sums
        above = norms > jnp.asarray(self.limits, norms.dtype)[:, None]
        return jnp.concatenate([sums, jnp.sum(counted & above, axis=1, dtype=jnp.float32)])

    def means(self, sums: tuple[float, ...], rows: float) -> dict[str, float]:
        """`mean_norm/GROUP` and, with limits, `clip_fraction/GROUP`, from reduced `sums` over that many rows."""
        count = len(self.names)
        found = {f"mean_norm/{name}": sums[place] / rows for place, name in enumerate(self.names)}
        if self.limits is not None:
            found |= {f"clip_fraction/{name}": sums[count + place] / rows for place, name in enumerate(self.names)}
        return found


def by_module(params: Any) -> NormGroups:
    """A group for each entry of the top level of `params`: a flax module's submodules, in their order there.

    Edge cases: parameters that are one array are one group, "parameters".
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    of_leaf = [jax.tree_util.keystr(path[:1], simple=True) or "parameters" for path in paths]
    names = list(dict.fromkeys(of_leaf))
    return NormGroups(tuple(names), tuple(names.index(name) for name in of_leaf))
