"""Measures how rounding one block changes the answers: the float model with a single
rounded block is compared with the unchanged float model.

The measure is the mean Kullback-Leibler divergence of next-token distributions over the
answers' positions, in nats. It is additive enough over blocks to rank mixtures, and it
needs no generation.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.blocks import Block, StreamedModel, Trace
from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme, fake_activation
from calibration.samples import Case

__all__ = ["divergence", "rounded", "sensitivities"]

Logits = NDArray[np.float32]


@contextlib.contextmanager
def rounded(
    model: nn.Module, block: Block, calibrated: Calibrated, scheme: LinearScheme
) -> Iterator[None]:
    """Makes a loaded block compute as the target will: weights are rounded to their
    grid, and activations are rounded before every linear layer.
    """
    handles, names = [], [name for feed in block.feeds for name in feed.linears]
    for name in (*block.norms, *names):  # a norm may have absorbed a scale
        for parameter, _ in model.get_submodule(name).named_parameters():
            full = f"{name}.{parameter}"
            linear = name in names and parameter == "weight" and scheme.quantised
            value = (
                calibrated.quantised(full, scheme).dequantised()
                if linear
                else calibrated.read(full)
            )
            setattr(model.get_submodule(name), parameter, nn.Parameter(value, requires_grad=False))
    if scheme.activation != "float":
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    partial(_round_input, scheme, _range(calibrated, name))
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _range(calibrated: Calibrated, name: str) -> tuple[float, float] | None:
    bounds = calibrated.get(f"{name}|range")
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))


def _round_input(
    scheme: LinearScheme,
    static: tuple[float, float] | None,
    module: nn.Module,
    arguments: tuple[Tensor],
) -> tuple[Tensor]:
    return (fake_activation(arguments[0], scheme.activation, static),)


def divergence(expected: Logits, found: Logits) -> float:
    """Returns the mean KL divergence of next-token distributions [n, V] in nats."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def sensitivities(
    model: StreamedModel,
    calibrated: Calibrated,
    cases: Sequence[Case],
    candidates: Callable[[Block], Mapping[str, LinearScheme]],
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, dict[str, float]]:
    """Returns the divergence of the answers when one block alone uses one of its
    candidates: {block: {candidate: nats}}.

    Every candidate costs a run of the block and all blocks after it. The inputs of
    every block are kept, so memory grows with blocks times cases.
    """
    blocks = model.blocks()
    entering: list[list[Trace]] = []
    traces = [Trace(case, torch.from_numpy(case.pixels)) for case in cases]
    with torch.no_grad():
        for block in blocks:
            entering.append([copy.copy(trace) for trace in traces])
            with model.loaded(block):
                for trace in traces:
                    block.run(trace)
        found: dict[str, dict[str, float]] = {}
        for index, block in enumerate(blocks):
            progress(index, len(blocks), f"sensitivity of {block.name}")
            for name, scheme in candidates(block).items() if block.feeds else ():
                changed = _rest(model, calibrated, scheme, blocks[index:], entering[index])
                values = [
                    divergence(a.logits, b.logits)
                    for a, b in zip(traces, changed, strict=True)
                    if a.logits is not None and b.logits is not None
                ]
                found.setdefault(block.name, {})[name] = float(np.mean(values))
    return found


def _rest(
    model: StreamedModel,
    calibrated: Calibrated,
    scheme: LinearScheme,
    blocks: Sequence[Block],
    entering: Sequence[Trace],
) -> list[Trace]:
    """Runs the first of `blocks` rounded and the others unchanged."""
    traces = [copy.copy(trace) for trace in entering]
    for position, block in enumerate(blocks):
        with (
            model.loaded(block),
            rounded(model.model, block, calibrated, scheme)
            if position == 0
            else contextlib.nullcontext(),
        ):
            for trace in traces:
                block.run(trace)
    return traces
