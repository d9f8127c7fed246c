"""Which sum of gradients a run takes, clipped or not, and its two step functions compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dpscale.baseline import summed_grad
from dpscale.clipping import Bound, ClippedSum, Flat, Normalized, NormGroups, PerPattern, by_module, clipped_grad
from dpscale.config import RunConfig
from dpscale.mesh import place_replicated, replicated
from dpscale.optimizer import make_optimizer
from dpscale.placement import Placement
from dpscale.privacy.plan import PrivacyPlan
from dpscale.state import TrainState
from dpscale.step import Rows, StepFunctions, build_accumulate, build_finalize, compile_steps
from dpscale.task import Task


def gradient_sum(config: RunConfig, plan: PrivacyPlan, task: Task) -> Callable[..., ClippedSum]:
    """The clipped sum of the task's per-example gradients, or without privacy the plain one.

    Where weights are frozen it takes them last: `summed(params, batch, mask, keys, frozen)`.
    """

    def of(loss: Callable[..., Any]) -> Callable[..., ClippedSum]:
        if not plan.enabled:
            return summed_grad(loss)
        method = config.performance.clipping_method
        return clipped_grad(loss, bound=clipping_bound(plan), method=method, norm_groups=groups)

    groups = norm_groups(config, plan, task.params)
    if task.frozen is None:
        return of(task.loss)
    return lambda params, batch, mask, keys, frozen: of(task.bind(frozen).loss)(params, batch, mask, keys)


def clipping_bound(plan: PrivacyPlan) -> Bound:
    """The bound of a plan with privacy; its `max_norm` is the plan's clip norm.

    Raises: InputError from its `groups` where the plan's groups do not fit the parameters.
    """
    assert plan.clip_norm is not None, "a plan with privacy has a clip norm"
    if plan.clip_groups is not None:
        return PerPattern(plan.clip_groups)
    return Normalized(plan.clip_norm) if plan.bound == "normalized" else Flat(plan.clip_norm)


def norm_groups(config: RunConfig, plan: PrivacyPlan, params: Any) -> NormGroups | None:
    """The groups whose mean norms the sensitive stream gets: those of the clipping, otherwise the modules; or None.

    Without privacy no norm is taken at all.
    """
    if not (config.metrics.group_norms and plan.enabled):
        return None
    if plan.clip_groups is None:
        return by_module(params)
    names, limits = zip(*plan.clip_groups, strict=True)
    return NormGroups(names, tuple(clipping_bound(plan).groups(params)), limits)


def check_groups(config: RunConfig, params: Any) -> None:
    """Raise InputError where privacy.clip_groups do not fit the parameters, before a run directory is made."""
    privacy = config.privacy
    if privacy.enabled and privacy.clip_groups:
        PerPattern(tuple(privacy.clip_groups.items())).groups(params)


def make_placement(config: RunConfig, plan: PrivacyPlan, mesh: Mesh, params: Any) -> Placement:
    """The config's optimizer, and how its state lies on the mesh. `params`: of the task; only the structure counts."""
    optimizer = make_optimizer(config.optimizer, plan.steps)
    sharded, average = config.performance.update_sharding == "sharded", config.training.ema_decay is not None
    groups = norm_groups(config, plan, params)
    group_sums = 0 if groups is None else groups.num_sums
    return Placement(mesh, optimizer, sharded=sharded, average=average, group_sums=group_sums)


def build_finalize_for(config: RunConfig, plan: PrivacyPlan, placement: Placement):
    """The jitted `finalize` of a run whose state lies as `placement` says."""
    return build_finalize(
        placement.mesh,
        plan,
        placement.optimizer,
        sharded=placement.sharded,
        reduce_every_accumulation=config.performance.reduce_every_accumulation,
        ema_decay=config.training.ema_decay if placement.average else None,
    )


def compiled_steps(
    config: RunConfig,
    plan: PrivacyPlan,
    task: Task,
    placement: Placement,
    state: TrainState,
    table: Mapping[str, Any],
    rows: Rows,
) -> StepFunctions:
    """Both step functions of a task, compiled for `state`, `table` and `rows`, whose shapes are enough."""
    clip_norm = math.inf if plan.clip_norm is None else plan.clip_norm
    every, mesh = config.performance.reduce_every_accumulation, placement.mesh
    groups = norm_groups(config, plan, task.params)
    accumulate = build_accumulate(
        mesh,
        gradient_sum(config, plan, task),
        clip_norm,
        task.uses_key,
        reduce_every_accumulation=every,
        norm_groups=groups,
    )
    finalize = build_finalize_for(config, plan, placement)
    frozen = task.frozen
    if frozen is not None and not _is_placed(frozen, mesh):
        frozen = place_replicated(mesh, frozen)
    return compile_steps(accumulate, finalize, mesh, state, table, rows, frozen, groups)


def _is_placed(tree: Any, mesh: Mesh) -> bool:
    return all(getattr(leaf, "sharding", None) == replicated(mesh) for leaf in jax.tree.leaves(tree))
