"""How an epsilon is printed: never below its value."""

import math


def shown_epsilon(value: float, digits: int = 3) -> str:
    """`value` with so many decimals, rounded up; "infinite" where it is not finite."""
    unit = 10**digits
    return f"{math.ceil(round(value * unit, 6)) / unit:.{digits}f}" if math.isfinite(value) else "infinite"
