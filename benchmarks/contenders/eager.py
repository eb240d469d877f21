"""Eager PyTorch: the trainer's own decoder and tower. They are also the reference for
the outputs of all contenders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contenders import CHECKPOINT, CONTEXT, Contender, file_bytes
from contenders.weights import write_checkpoint
from trainer.checkpoint import open_checkpoint
from trainer.decoder import Decoder, rotary_tables
from trainer.vision import PoolAdapter, VisionTower

__all__ = ["EagerDecoder", "EagerVision", "filled", "load", "prepare", "tower", "versions"]

Array = NDArray[np.float32]
Module = TypeVar("Module", bound=nn.Module)


class EagerDecoder:
    """See `contenders.Decoder`."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        spec = open_checkpoint(checkpoint).spec.decoder
        with torch.device("meta"):  # skips initial values, which the checkpoint replaces
            empty = Decoder(spec)
        self._model = filled(empty, "decoder.", checkpoint).to(dtype)
        self._model.rotary_cos, self._model.rotary_sin = rotary_tables(spec)
        self._shape, self._dtype = (1, spec.kv_heads, CONTEXT, spec.head_dim), dtype
        self._layers = spec.layers
        table = self._model.embed_tokens.weight
        self.weight_bytes = (
            sum(parameter.nbytes for parameter in self._model.parameters()) - table.nbytes
        )
        self.disk_bytes = file_bytes(checkpoint)
        self.reset()

    def reset(self) -> None:
        """See `contenders.Decoder`."""
        self._position = 0
        self._caches = [
            (
                torch.zeros(self._shape, dtype=self._dtype),
                torch.zeros(self._shape, dtype=self._dtype),
            )
            for _ in range(self._layers)
        ]

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Array:
        """See `contenders.Decoder`."""
        positions = torch.arange(self._position, self._position + len(tokens))[None]
        logits, self._caches = self._model.step(
            self._model.embed_tokens(torch.tensor([tokens])), positions, self._caches
        )
        self._position += len(tokens)
        return logits[0].float().numpy()

    def step(self, token: int) -> Array:
        """See `contenders.Decoder`."""
        return self.prefill([token])


class Tower(nn.Module):
    """The vision tower and the adapter as one module, with the inputs of the vision
    graph.
    """

    def __init__(self, vision_tower: VisionTower, pool_adapter: PoolAdapter) -> None:
        super().__init__()
        self.vision_tower, self.pool_adapter = vision_tower, pool_adapter

    def forward(self, pixels: Tensor, pool: Tensor) -> Tensor:
        """Maps pixels [1, 3, S, S] and pool [T, s*s] to embeddings [1, T, H]."""
        return self.pool_adapter(self.vision_tower(pixels), pool)


class EagerVision:
    """See `contenders.Vision`."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = tower(checkpoint)
        self.disk_bytes = sum(parameter.nbytes for parameter in self._model.parameters())

    @torch.inference_mode()
    def embed(self, pixels: Array, pool: Array) -> Array:
        """See `contenders.Vision`."""
        return self._model(torch.from_numpy(pixels), torch.from_numpy(pool))[0].numpy()


def filled(module: Module, prefix: str, checkpoint: Path) -> Module:
    """Fills a module made on the meta device with its part of the checkpoint's weights,
    in float32, and returns it.
    """
    stored = open_checkpoint(checkpoint)
    module.load_state_dict(
        {name: stored.read(f"{prefix}{name}") for name in module.state_dict()}, assign=True
    )
    return module.eval()


def tower(checkpoint: Path) -> Tower:
    """Returns the vision tower and the adapter of a checkpoint."""
    spec = open_checkpoint(checkpoint).spec
    with torch.device("meta"):
        empty = Tower(VisionTower(spec.vision), PoolAdapter(spec.vision.width, spec.decoder.hidden))
    return filled(empty, "", checkpoint)


def prepare(folder: Path, contender: Contender) -> None:
    """Writes the common weights unless they exist."""
    write_checkpoint(folder)


def load(folder: Path, contender: Contender, threads: int) -> Any:
    """Loads the checkpoint."""
    torch.set_num_threads(threads)
    if contender.part == "vision":
        return EagerVision(folder / CHECKPOINT)
    return EagerDecoder(folder / CHECKPOINT, getattr(torch, contender.options["dtype"]))


def versions() -> dict[str, str]:
    """Returns the version of PyTorch."""
    return {"torch": torch.__version__}
