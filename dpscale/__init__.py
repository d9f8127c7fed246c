"""dpscale: differentially private training of JAX models, from a laptop to a SLURM cluster.

The public names are imported on first use: `import dpscale` alone starts no jax backend and takes no time.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpscale.clipping import ClippedSum as ClippedSum
    from dpscale.clipping import clipped_grad as clipped_grad
    from dpscale.config import RunConfig as RunConfig
    from dpscale.config import load_config as load_config
    from dpscale.errors import DivergedError as DivergedError
    from dpscale.errors import DpscaleError as DpscaleError
    from dpscale.errors import InputError as InputError
    from dpscale.errors import PrivacyError as PrivacyError
    from dpscale.errors import RunDirectoryError as RunDirectoryError
    from dpscale.privacy.accounting import delta as delta
    from dpscale.privacy.accounting import epsilon as epsilon
    from dpscale.privacy.accounting import noise_multiplier as noise_multiplier
    from dpscale.privacy.plan import PrivacyPlan as PrivacyPlan
    from dpscale.release import release as release
    from dpscale.release_files import load_release as load_release
    from dpscale.sampling import PoissonSampler as PoissonSampler
    from dpscale.train import TrainResult as TrainResult
    from dpscale.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "ClippedSum": "dpscale.clipping",
    "clipped_grad": "dpscale.clipping",
    "RunConfig": "dpscale.config",
    "load_config": "dpscale.config",
    "DivergedError": "dpscale.errors",
    "DpscaleError": "dpscale.errors",
    "InputError": "dpscale.errors",
    "PrivacyError": "dpscale.errors",
    "RunDirectoryError": "dpscale.errors",
    "delta": "dpscale.privacy.accounting",
    "epsilon": "dpscale.privacy.accounting",
    "noise_multiplier": "dpscale.privacy.accounting",
    "PrivacyPlan": "dpscale.privacy.plan",
    "load_release": "dpscale.release_files",
    "release": "dpscale.release",
    "PoissonSampler": "dpscale.sampling",
    "TrainResult": "dpscale.train",
    "train": "dpscale.train",
}
__all__ = ["__version__", *_HOMES]


class _Package(types.ModuleType):
    """Keeps `dpscale.train` the function: importing the module of the same name would otherwise replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpscale' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
