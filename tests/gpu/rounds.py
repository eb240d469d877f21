"""Times contenders in turn, round after round, so that ratios within a round are
meaningful even if clock rates change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.gpu.sides import Absent, Broken

__all__ = ["interleaved"]

Once = Callable[[], Mapping[str, float]]


def interleaved(contenders: Mapping[str, Once], rounds: int) -> dict[str, Any]:
    """Returns the times per contender and stage, one number per round, after one
    warm-up round. Every second round runs in reverse order.

    A contender that fails is dropped with all its times, so that every list has one
    number per round. `absent` gives the reasons, and `broken` names the contenders that
    broke down.
    """
    left, absent, broken = dict(contenders), dict[str, str](), list[str]()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in left}
    for number in range(rounds + 1):
        for name in reversed(list(left)) if number % 2 else list(left):
            try:
                found = left[name]()
            except (Absent, Broken) as error:
                absent[name] = str(error)
                broken += [name] if isinstance(error, Broken) else []
                del left[name], times[name]
                continue
            if number:
                for stage, milliseconds in found.items():
                    times[name].setdefault(stage, []).append(milliseconds)
    return {"contenders": times, "absent": absent, "broken": broken}
