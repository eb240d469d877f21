"""Everything about `accelerate`: training in one process or many, on the CPU or on
GPUs.

The same command runs alone, under `torchrun`, and under `accelerate launch` with a
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
    """Returns an accelerator and joins the other processes, if there are any. `auto`
    computes in bf16 if the hardware supports bf16 multiplication, else in fp32.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16())
    # Without this, a second run in the same process could not choose another precision.
    AcceleratorState._reset_state()
    return autocast_only(
        Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    )


def autocast_only(accelerator: Accelerator) -> Accelerator:
    """Lets autocast handle bf16 under FSDP2 too. FSDP2's own mixed-precision policy
    casts weights but not the trainer's batches.
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
    """Sets the CPU threads of this process: `threads` if given, else the cores divided
    by the number of processes on this machine.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local))


def gather_object(items: list[Any]) -> list[Any]:
    """Returns the joined lists of all processes, in every process."""
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object(items)
    return gathered


def leave_processes() -> None:
    """Waits for all processes and ends their group. Does nothing in a single process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def full_state(
    accelerator: Accelerator, module: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the whole states of a module and its optimiser, on the main process. Call
    it on all processes, because sharded states are gathered.
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
    """Loads states that `full_state` returned. Every process passes the whole states."""
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
    """Gathers sharded weights: whole on the main process, an empty dict on others.
    Returns None if weights are not sharded. Call it on all processes.
    """
    if not isinstance(module, FSDPModule):
        return None
    return get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _inner(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimiser inside accelerate's wrapper."""
    return getattr(optimiser, "optimizer", optimiser)
