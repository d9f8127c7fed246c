"""Timing several things so that their ratios mean something: they take turns (A B C A B C ...)."""

import time
from collections.abc import Callable, Mapping

TURN_S = 0.3


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each timed call. Each call must return only when its work is done.

    In each of `repeats` turns a call is repeated for `TURN_S` seconds or made once, whichever is longer, after as long
    a warm-up: the one before may have taken gigabytes, and left caches and freed pages behind in a state that costs the
    next one.
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            _turn(call)
            seen[name] += _turn(call)
    return seen


def _turn(call: Callable[[], object]) -> list[float]:
    times: list[float] = []
    while not times or sum(times) < TURN_S:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times
