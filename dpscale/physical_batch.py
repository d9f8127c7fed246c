"""`performance.physical_batch_size = "auto"`: the largest physical batch that fits a device and wastes little."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from dpscale.batching import BatchLayout
from dpscale.config import RunConfig
from dpscale.data.source import ExampleSource, empty_rows
from dpscale.distributed import decided_by_process_zero
from dpscale.errors import InputError
from dpscale.gradients import gradient_sum
from dpscale.privacy.plan import PrivacyPlan
from dpscale.sampling import PoissonSampler
from dpscale.task import Task

# Of a device's free memory: the rest is for the compiler's own buffers, fragmentation and what the run adds.
USABLE_FRACTION = 0.8
ACCEPTED_PADDING = 0.06
PROBES = (8, 16)  # rows; memory is a constant and a part for each row, told from two compilations
SMALLEST = 1


def physical_batch_size(
    config: RunConfig, plan: PrivacyPlan, task: Task, source: ExampleSource, num_devices: int
) -> int:
    """The number that the config gives, or for "auto" the largest power of two, in rows per device, that fits.

    Among those that fit the device's memory the largest is taken whose expected padding is at most 6 % of all rows,
    or, where none keeps to that, the one with the least. Reads no example, and changes no result of the run.

    Raises: InputError when not even one row fits.
    """
    given = config.performance.physical_batch_size
    if given != "auto":
        return given
    sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, bytes(32), plan.max_batch_size)
    fitting = _fitting(config, plan, task, source, sampler, num_devices)
    # privacy.constant_time pads all of these further, by nearly the same for each: it would only hide the difference.
    waste = {rows: BatchLayout(rows, num_devices).expected_padding_waste(sampler) for rows in fitting}
    small = [rows for rows in fitting if waste[rows] <= ACCEPTED_PADDING]
    return max(small) if small else min(fitting, key=lambda rows: waste[rows])


def agreed_physical_batch_size(
    config: RunConfig, plan: PrivacyPlan, task: Task, source: ExampleSource, num_devices: int
) -> int:
    """`physical_batch_size`, the same on every process, whatever memory each has free: process 0 decides."""
    if config.performance.physical_batch_size != "auto":
        return config.performance.physical_batch_size

    def decide() -> dict[str, int]:
        return {"rows": physical_batch_size(config, plan, task, source, num_devices)}

    return decided_by_process_zero(decide)["rows"]


def accumulate_bytes(config: RunConfig, plan: PrivacyPlan, task: Task, source: ExampleSource, rows: int) -> int:
    """What the compiler needs on one device for the gradients of `rows` examples: temporaries, rows and result."""
    summed = gradient_sum(config, plan, task)
    batch = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)
        for name, array in empty_rows(source.metadata, 0).items()
    }
    words = jnp.zeros((rows, 2), jnp.uint32)
    keys = jax.eval_shape(lambda: jax.random.wrap_key_data(words, impl="threefry2x32"))
    mask = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    arguments = (task.params, batch, mask, keys if task.uses_key else None)
    arguments += () if task.frozen is None else (task.frozen,)
    return program_bytes(jax.jit(summed).lower(*arguments).compile())


def program_bytes(program: jax.stages.Compiled) -> int:
    """What the compiler says that a program needs: temporaries, arguments and results.

    Raises: InputError where this backend's compiler does not say.
    """
    memory = program.memory_analysis()
    if memory is None:
        raise InputError(
            "this backend does not say how much memory a program needs, so performance.physical_batch_size=auto has "
            "nothing to go by: give a number"
        )
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def free_bytes() -> int:
    """Memory that one local device of this process can still give out."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // len(jax.local_devices())


def _fitting(
    config: RunConfig,
    plan: PrivacyPlan,
    task: Task,
    source: ExampleSource,
    sampler: PoissonSampler,
    num_devices: int,
) -> list[int]:
    """Powers of two up to the whole expected batch, as far as memory goes by the line through two compilations."""
    small, large = (accumulate_bytes(config, plan, task, source, rows) for rows in PROBES)
    per_row = max(1, (large - small) // (PROBES[1] - PROBES[0]))
    constant = max(0, small - PROBES[0] * per_row)
    limit = int(USABLE_FRACTION * free_bytes())
    most = (limit - constant) // per_row
    if most < SMALLEST:
        raise InputError(
            f"one example needs about {(constant + per_row) / 2**30:.1f} GiB on a device, of {limit / 2**30:.1f} GiB "
            "that can be used: choose a smaller model, performance.clipping_method=ghost, or another device"
        )
    share = max(SMALLEST, -(-round(sampler.expected_batch_size) // num_devices))
    return [1 << k for k in range(min(most, share).bit_length())]
