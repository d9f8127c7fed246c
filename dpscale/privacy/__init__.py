"""What is promised, and what it costs: plan, accounting, sensitivity, secrets. Imports neither jax nor, until
a figure is asked for, dp-accounting. The names are imported on first use, for the verbs that must answer at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpscale.privacy.accounting import delta as delta
    from dpscale.privacy.accounting import epsilon as epsilon
    from dpscale.privacy.accounting import epsilon_curve as epsilon_curve
    from dpscale.privacy.accounting import noise_multiplier as noise_multiplier
    from dpscale.privacy.plan import PrivacyPlan as PrivacyPlan
    from dpscale.privacy.secret import RootSecret as RootSecret

_HOMES: dict[str, str] = dict.fromkeys(
    ("delta", "epsilon", "epsilon_curve", "noise_multiplier"), "dpscale.privacy.accounting"
)
_HOMES |= {"PrivacyPlan": "dpscale.privacy.plan", "RootSecret": "dpscale.privacy.secret"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
