"""One process or many, on CPU or GPU: everything about `accelerate` is here.

The same command runs alone, under `torchrun` and under `accelerate launch` with a
configuration (data parallel, or sharded by FSDP2).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from runtime.contract.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "PRECISIONS",
    "autocast_only",
    "fast_bf16",
    "full_state",
    "gather_object",
    "gathered_weights",
    "leave_processes",
    "load_full_state",
    "make_accelerator",
    "set_threads",
]

PRECISIONS = ("auto", "bf16", "fp32")


def make_accelerator(precision: str = "auto") -> Accelerator:
    """Joins the other processes, if there are any. `auto` computes in bf16 where the
    hardware multiplies it, else in fp32.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16())
    # else a second run in one process could not choose another precision
    AcceleratorState._reset_state()
    return autocast_only(
        Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    )


def autocast_only(accelerator: Accelerator) -> Accelerator:
    """Leaves bf16 to autocast where weights are sharded, as everywhere else: FSDP2's
    own policy casts weights but not our batches.
    """
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware (GPUs since Ampere, CPUs with
    AVX512-BF16 or AMX); without it bf16 is far slower than fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_threads(threads: int | None) -> None:
    """CPU threads of this process: as asked, else the cores divided among the machine's
    processes.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local))


def gather_object(items: list[Any]) -> list[Any]:
    """The processes' lists joined, in all of them."""
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object(items)
    return gathered


def leave_processes() -> None:
    """Waits for all processes and ends their group; nothing to do for a process alone."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def full_state(
    accelerator: Accelerator, module: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole states of a module and its optimiser, on the main process. Call it on all
    processes: sharded ones gather.
    """
    if not isinstance(module, FSDPModule):
        return accelerator.unwrap_model(module).state_dict(), optimiser.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options), get_optimizer_state_dict(
        module, _inner(optimiser), options=options
    )


def load_full_state(
    accelerator: Accelerator,
    module: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    weights: dict[str, Any],
    moments: dict[str, Any] | None,
) -> None:
    """The inverse of `full_state`; every process passes the whole states."""
    if not isinstance(module, FSDPModule):
        accelerator.unwrap_model(module).load_state_dict(weights)
        if optimiser is not None and moments is not None:
            optimiser.load_state_dict(moments)
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(module, weights, options=options)
    if optimiser is not None and moments is not None:
        set_optimizer_state_dict(module, _inner(optimiser), moments, options=options)


def gathered_weights(module: nn.Module) -> dict[str, Any] | None:
    """Whole weights on the main process (an empty dict on others) where they were
    sharded, else None. Call it on all processes.
    """
    if not isinstance(module, FSDPModule):
        return None
    return get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _inner(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    return getattr(optimiser, "optimizer", optimiser)
