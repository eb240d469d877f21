"""PyTorch as an engine: the trainer's own tower and decoder on the GPU, in fp32 or
fp16, eager or compiled with CUDA graphs.

It has the same calls as the runtime's `Engine`, so the same code replays goldens and
answers questions for it. Keys and values lie in preallocated buffers, as usual in fast
PyTorch code. A decode step runs entirely on the device and copies only the token to the
host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.engines import Validation
from runtime.engines.logits import check_finite
from tests.gpu.settings import COMPILED, EAGER
from trainer.checkpoint import open_checkpoint
from trainer.decoder import Decoder, rotary_tables
from trainer.model import InfMLLM

__all__ = ["PyTorchEngine", "copy_gbs", "load_model"]

_FULL = "vision_tower.norm."
_COPY_BYTES, _COPIES = 1 << 30, 10
Array = NDArray[np.float32]


def load_model(checkpoint: Path, dtype: torch.dtype, device: str) -> InfMLLM:
    """Loads a checkpoint's weights to the device, tensor by tensor. Rotary tables and
    the tower's last norm stay in fp32, the type in which the model uses them.
    """
    stored = open_checkpoint(checkpoint)
    with torch.device("meta"):  # skips initial values, which the checkpoint replaces
        model = InfMLLM(stored.spec)
    kept = {name: torch.float32 if name.startswith(_FULL) else dtype for name in stored.places}
    model.load_state_dict(
        {name: stored.read(name).to(device, kept[name]) for name in stored.places}, assign=True
    )
    model.decoder.rotary_cos, model.decoder.rotary_sin = (
        table.to(device) for table in rotary_tables(stored.spec.decoder)
    )
    return model.eval().requires_grad_(False)


class _InPlace:
    """A cache that `Decoder` updates in place. Its `scatter` writes the given rows and
    returns the same memory.
    """

    def __init__(self, rows_BKCD: Tensor) -> None:
        self._rows, self.shape = rows_BKCD, rows_BKCD.shape

    def scatter(self, axis: int, index: Tensor, source: Tensor) -> Tensor:
        """See `Tensor.scatter_`."""
        return self._rows.scatter_(axis, index, source)


class _Step(nn.Module):
    """The decoder with its caches. Maps input embeddings and positions to the logits of
    the last position and the most likely token.
    """

    def __init__(self, decoder: Decoder, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = decoder
        layer: Any = decoder.layers[0].self_attn
        shape = (1, layer.k_proj.out_features // layer.head_dim, rows, layer.head_dim)
        for name in self._names():
            self.register_buffer(
                name,
                torch.zeros(shape, dtype=dtype, device=decoder.embed_tokens.weight.device),
                persistent=False,
            )

    def _names(self) -> list[str]:
        return [
            f"{kind}_{index}"
            for index in range(len(self.decoder.layers))
            for kind in ("keys", "values")
        ]

    def forward(self, inputs_1LH: Tensor, positions_1L: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits [V] in fp32 and the token [1, 1]."""
        caches = [_InPlace(getattr(self, name)) for name in self._names()]
        pairs: Any = list(zip(caches[::2], caches[1::2], strict=True))
        logits, _ = self.decoder.step(inputs_1LH, positions_1L, pairs)
        return logits[0].float(), logits.argmax(-1, keepdim=True)


class _Next(nn.Module):
    """A whole decode step on the device. Maps token [1, 1] and position [1, 1] to the
    next token and position.
    """

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next token and the next position."""
        return self.step(self.step.decoder.embed_tokens(token), position)[1], position + 1


class PyTorchEngine:
    """See `runtime.engines.Engine`. `rows` is the length of its caches. Compiled calls
    are fast only if the same shapes are used again.
    """

    verifies = False
    validation: Validation | None = None

    def __init__(self, model: InfMLLM, rows: int, variant: str = EAGER) -> None:
        weight = model.decoder.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self.capacity, self.version = rows, f"{variant} {torch.__version__}, {self._dtype}"
        step = _Step(model.decoder, rows, self._dtype)
        calls: list[Callable[..., Any]] = [
            lambda pixels, pool: model.pool_adapter(model.vision_tower(pixels), pool),
            step,
            _Next(step),
        ]
        if variant == COMPILED:
            calls = [torch.compile(call, mode="reduce-overhead", dynamic=False) for call in calls]
        self._vision, self._step, self._next = calls

    def _up(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    @torch.no_grad()
    def embed_image(self, pixels: Array, pool: Array) -> Array:
        """See `Engine.embed_image`."""
        found: Array = self._vision(self._up(pixels), self._up(pool)).float().cpu().numpy()
        return found

    @torch.no_grad()
    def _run(self, inputs_embeds: Array, start: int) -> tuple[Tensor, Tensor]:
        positions = np.arange(start, start + inputs_embeds.shape[1])[None]
        found: tuple[Tensor, Tensor] = self._step(self._up(inputs_embeds), self._up(positions))
        return found

    def forward(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.forward`."""
        logits: Array = self._run(inputs_embeds, start)[0].cpu().numpy()
        return logits

    def greedy(self, inputs_embeds: Array, start: int) -> int:
        """See `Engine.greedy`."""
        logits, token = self._run(inputs_embeds, start)
        check_finite(logits.abs().sum(0, keepdim=True).cpu().numpy())
        return int(token)

    @torch.no_grad()
    def greedy_steps(self, token: int, start: int, count: int) -> list[float]:
        """Returns the milliseconds of each of `count` greedy steps from a token. All
        work is on the device; only the token's id is copied to the host, where a caller
        checks for the end.
        """
        at, place, times = self._up(np.array([[token]])), self._up(np.array([[start]])), []
        for _ in range(count):
            begun = time.perf_counter()
            if self._device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            at, place = (
                value.clone() for value in self._next(at, place)
            )  # clones, because the next run of a CUDA graph overwrites its outputs
            int(at)
            times.append((time.perf_counter() - begun) * 1e3)
        return times

    def verify(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.verify`; it is called with one step only."""
        return self.forward(inputs_embeds, start)[None]

    def batch(self, slots: int, rows: int) -> Any:
        """Not supported: this engine answers one question at a time."""
        raise NotImplementedError("PyTorch is asked one question at a time here")


def copy_gbs(device: str, size: int = _COPY_BYTES) -> float:
    """Returns the best rate of copies within the device's memory in GB/s, where a byte
    read and written counts as two.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(_COPIES + 1):
        wait()
        begun = time.perf_counter()
        target.copy_(source)
        wait()
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best / 1e9
