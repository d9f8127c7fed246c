"""What else than the plan decides a step's output: config, loss, versions. A change of it must not reuse noise."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.config import RunConfig

# Sections and keys that change no gradient, no noise and no update: they may change from one start to the next.
FREE = {
    "performance": None,
    "checkpoint": None,
    "metrics": None,
    "run": {"name"},
    "model": {"pretrained"},  # where it lies; what it holds is a fact of the task
    "data": {"residence", "num_threads", "validation", "validation_is"},
    "training": {"evaluate_every_steps", "evaluate_ema"},
}
PACKAGES = ("dpscale", "jax", "jaxlib", "flax", "optax", "numpy")
# What draws and what steps; the code of model, loss and transforms is in the loss's own digest.
DRAW_SOURCES = ("batching", "data/loader", "data/resident", "data/users", "feed", "loop", "privacy/secret", "sampling")
STEP_SOURCES = ("chacha", "clipping", "gradients", "noise", "optimizer", "placement", "shard_update", "state", "step")
ROOT = Path(__file__).parent
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def program_facts(config: RunConfig, loss: Callable[..., Any], params: Any, example: Any, uses_key: bool) -> dict:
    """Flat, JSON-like facts; two starts of a run with equal facts compute the same step functions.

    The loss enters as the digest of its program and its gradient's for one example, so that an edit of the model's or
    the loss's code is seen, also inside custom derivatives, and so are constants that it closes over, at any depth.
    Nothing here derives from training data.
    """
    facts: dict[str, Any] = {}
    for section, values in config.model_dump(exclude_none=True).items():
        free = FREE.get(section, set())
        if free is not None and section != "privacy":  # the plan holds what [privacy] says
            facts |= {f"{section}.{key}": value for key, value in values.items() if key not in free}
    facts["performance.compute_dtype"] = config.performance.compute_dtype
    facts["loss"] = _program_digest(loss, params, example, uses_key)
    facts |= {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    facts["dpscale source"] = source_digest()
    # Decides what augmentation and dropout draw, and no traced program shows it.
    facts["jax_threefry_partitionable"] = bool(jax.config.values["jax_threefry_partitionable"])
    return json.loads(json.dumps(facts))


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 over the files of dpscale that a step is made of and its loss is not, 64 hexadecimal digits.

    An edited installation has the version that it had before.
    """
    hasher = hashlib.sha256()
    for name in DRAW_SOURCES + STEP_SOURCES:
        files = [root / f"{name}.py"] if (root / f"{name}.py").exists() else sorted((root / name).glob("*.py"))
        for file in files:
            hasher.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return hasher.hexdigest()


def digest(facts: dict) -> str:
    """SHA-256 of the facts, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def differences(old: dict, new: dict) -> list[str]:
    """One "key: old -> new" for each fact that differs."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _program_digest(loss: Callable[..., Any], params: Any, example: Any, uses_key: bool) -> str:
    key = (jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32"),) if uses_key else ()
    program = jax.make_jaxpr(jax.value_and_grad(loss, allow_int=True))(params, example, *key)
    hasher = hashlib.sha256(_ADDRESS.sub("", str(program.jaxpr)).encode())
    for constant in _constants(program):
        is_key = jnp.issubdtype(jax.dtypes.result_type(constant), jax.dtypes.prng_key)
        hasher.update(np.asarray(jax.random.key_data(constant) if is_key else constant).tobytes())
    return hasher.hexdigest()


def _constants(program: Any) -> Iterator[Any]:
    """Values that a program closes over, those of the programs that it calls included, whose text leaves them out."""
    yield from getattr(program, "consts", ())
    for equation in getattr(program, "jaxpr", program).eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _constants(inner)
