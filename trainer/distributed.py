"""Data-parallel training over processes started by `torchrun`: ranks from the environment, gradients averaged through one flat buffer.

Without `torchrun` everything here is a no-op for a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

__all__ = ["World"]


class World:
    """This process's place among the others. Joins the group on creation if `torchrun` set one up (gloo on the CPU)."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")

    @property
    def is_main(self) -> bool:
        """True in the process that saves and prints."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over all processes."""
        if self.size == 1:
            return
        together = list(tensors)
        flat = torch.cat([t.flatten() for t in together])
        distributed.all_reduce(flat)
        flat /= self.size
        offset = 0
        for tensor in together:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            distributed.barrier()
