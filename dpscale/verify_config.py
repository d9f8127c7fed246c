"""`dpscale verify`: a config's steps on the processes and devices at hand, without a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from dpscale.batching import run_layout
from dpscale.config import RunConfig
from dpscale.data.resident import resident_shapes
from dpscale.distributed import Membership, decided_by_process_zero, initialize
from dpscale.errors import InputError
from dpscale.feed import blank_rows
from dpscale.gradients import compiled_steps, make_placement
from dpscale.mesh import data_mesh, replicated
from dpscale.physical_batch import agreed_physical_batch_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.task import build_task
from dpscale.train import configure_jax, find_source
from dpscale.verify import ALONE, MadeUp, Verdict, verify_steps
from dpscale.watchdog import Watchdog


def verify(
    config: RunConfig,
    *,
    model: Any = None,
    loss: Callable[..., jax.Array] | None = None,
    train_data: Any = None,
    watchdog: Watchdog | None = None,
) -> Verdict:
    """Compile a config's step functions and check every law on them, with more draws of noise than a run takes.

    Reads no example, writes no file.

    Raises: InputError for a config that cannot be used or has no privacy; VerificationError where a law does not hold.
    """
    watchdog = watchdog or Watchdog.off()
    configure_jax(config)
    initialize(Membership.from_environment())
    if not config.privacy.enabled:
        raise InputError("privacy.enabled=false: there is no clip and no noise to verify")
    try:
        with watchdog.grace():
            source = find_source(config, train_data, config.data.train, "train")
            task = build_task(config, source.metadata, model, loss)
            made = decided_by_process_zero(
                lambda: {"plan": PrivacyPlan.from_config(config, num_examples=len(source)).to_json()}
            )
            plan = PrivacyPlan.from_json(made["plan"])
            mesh = data_mesh()
            size = agreed_physical_batch_size(config, plan, task, source, mesh.size)
            layout = run_layout(config, plan, size, mesh.size)
            placement = make_placement(config, plan, mesh, task.params)
            resident = config.data.residence == "device"
            table = resident_shapes(source, replicated(mesh)) if resident else {}
            rows = blank_rows(mesh, source, layout, config.data)
            state = placement.abstract(task.params)
            functions = compiled_steps(config, plan, task, placement, state, table, rows)
            made_up = MadeUp(mesh, layout, source.metadata, len(source), resident)
            return verify_steps(config, plan, task, placement, functions, made_up, ALONE)
    finally:
        watchdog.close()
