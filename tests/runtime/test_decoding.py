"""`Decoding`: what cannot be meant is refused when it is written, in one line."""

from __future__ import annotations

import pytest

from runtime import Decoding
from runtime.contract.errors import UsageError


@pytest.mark.parametrize(
    "wrong",
    [
        {"beams": 0},
        {"beams": 99},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 1},
        {"repetition_penalty": 0},
        {"lookup": 99},
        {"seed": -1},
        {"stop": ("",)},
        {"beams": 2, "temperature": 1},
        {"beams": 2, "lookup": 3},
        {"top_k": 3},
        {"beams": 2.5},
        {"beams": "3"},
        {"top_k": 2.5, "temperature": 1},
        {"seed": 1.5},
        {"temperature": 1e-320},
        {"stop": "zone"},
        {"stop": (3,)},
        {"schema": 3},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Decoding(**wrong)  # type: ignore[arg-type]
