"""Checks that a session's inputs and outputs match the manifest's spec, before anything
is bound to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnxruntime as ort

from runtime.contract.bundle import Bundle
from runtime.contract.errors import BundleError
from runtime.contract.graphs import IMAGE_EMBEDS, PIXELS, POOL

__all__ = ["Shape", "check_values", "check_vision"]

Shape = tuple[int | None, ...]
"""Static dimensions; None for a free dimension."""


def check_values(
    bundle: Bundle, file: str, found_values: Iterable[Any], expected: Mapping[str, Shape]
) -> None:
    """Raises `BundleError` unless a graph's inputs (or outputs) are exactly the
    expected ones, with their static dimensions.
    """
    found = {value.name: value for value in found_values}
    for name in sorted(set(found) ^ set(expected)):
        raise BundleError(
            f"{bundle.path / file}: {name} is {'unexpected' if name in found else 'missing'}; "
            f"graph and manifest do not belong together, re-export the bundle"
        )
    for name, shape in expected.items():
        dims = found[name].shape
        if len(dims) != len(shape) or any(
            isinstance(d, int) and w is not None and d != w
            for d, w in zip(dims, shape, strict=True)
        ):
            raise BundleError(
                f"{bundle.path / file}: {name} has shape {dims}, the manifest's spec expects "
                f"{list(shape)}; re-export the bundle"
            )


def check_vision(bundle: Bundle, file: str, session: ort.InferenceSession) -> None:
    """Runs `check_values` on the inputs and outputs of a vision graph."""
    tower = bundle.spec.vision
    pixels = (None, 3, tower.image_size, tower.image_size)
    check_values(bundle, file, session.get_inputs(), {PIXELS: pixels, POOL: (None, tower.grid**2)})
    check_values(
        bundle,
        file,
        session.get_outputs(),
        {IMAGE_EMBEDS: (None, None, bundle.spec.decoder.hidden)},
    )
