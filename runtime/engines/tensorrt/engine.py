"""Runs a `tensorrt` bundle on an NVIDIA GPU with two engines. The caches never leave
the device, and a greedy decode step returns only a token id.

Plain greedy decoding needs no logits on the host. Sampling, beam search and constraints
copy one row of logits per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import Bundle
from runtime.contract.graphs import key_cache
from runtime.engines import EngineOptions, Validation
from runtime.engines.logits import check_finite
from runtime.engines.tensorrt.execution import Activations, DecodeContext, Prefill, Vision
from runtime.engines.tensorrt.graph_variants import MOST_ROWS, MOST_TOKENS
from runtime.engines.tensorrt.kv_cache import Caches, Rows
from runtime.engines.tensorrt.provider import (
    EngineProvider,
    Part,
    decoder_variants,
    vision_variants,
)
from runtime.engines.tensorrt.trt import Machine

__all__ = ["TensorRtEngine"]


class _Loaded:
    """Both engines with all the memory they compute in. Raises a `ContextError` that
    names what does not fit into memory.
    """

    def __init__(self, machine: Machine, bundle: Bundle, vision: Part, decoder: Part) -> None:
        spec, device = bundle.spec, machine.device
        baked = int(decoder.engine.get_tensor_shape(key_cache(0))[2])
        rows = decoder.form.rows if decoder.form.rows is not None else baked
        self.caches = Caches(device, spec.decoder, rows)
        fresh = (
            None
            if decoder.form.updates_caches
            else Rows(device, spec.decoder, min(rows, MOST_TOKENS), "new keys and values")
        )
        activations = Activations(
            machine, {part.form.file: part.engine for part in (vision, decoder)}
        )
        self.vision = Vision(machine, vision.engine, activations, spec)
        self.prefill = Prefill(machine, decoder.engine, activations, spec, self.caches, fresh)
        self.step = DecodeContext(machine, decoder.engine, activations, spec, self.caches, fresh)
        device.wait()


class TensorRtEngine:
    """Runs the graphs of a `tensorrt` bundle. After a GPU error, every further call
    raises `EngineError` at once.
    """

    verifies = True

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self._bundle, self._machine = bundle, Machine()
        self._wrong_choice = ""
        self._provider = EngineProvider(bundle, self._machine, options)
        self._vision = Part(("vision",), vision_variants(bundle, self._machine))
        self._decoder = Part(
            ("prefill", "decode"), decoder_variants(bundle, self._machine, options.context)
        )
        for part in (self._vision, self._decoder):
            self._provider.fill(part)
        self._load()

    def _load(self) -> None:
        self._loaded: _Loaded | None = _Loaded(
            self._machine, self._bundle, self._vision, self._decoder
        )
        self.capacity = self._loaded.caches.most
        files = f"{self._vision.form.file}, {self._decoder.form.file}"
        self.version = (
            f"TensorRT {self._machine.release} ({files}; {self._machine.device.name}, "
            f"driver {self._machine.device.versions[0]})"
        )

    @property
    def _ready(self) -> _Loaded:
        self._machine.device.check()
        assert self._loaded is not None, (
            "nothing runs while another form of a graph is being loaded"
        )
        return self._loaded

    @property
    def validation(self) -> Validation | None:
        """See `Engine.validation`."""
        return None if self._vision.proved and self._decoder.proved else self

    def conclude(self, failed: Mapping[str, str]) -> None:
        """See `Validation.conclude`; what goldens do not show, the tokens chosen on the
        GPU, was looked at beside them.
        """
        if self._wrong_choice:
            failed = {**failed, "decode": self._wrong_choice}
        self._wrong_choice = ""
        if failed:
            self._loaded = None  # frees its memory for the replacement
        self._provider.conclude((self._vision, self._decoder), failed)
        if failed:
            self._load()

    def _compare(self, logits: NDArray[np.float32], token: int) -> None:
        """Records that the GPU chose a token that is not the most likely one."""
        if np.isfinite(logits).all() and logits[token] != logits.max():
            self._wrong_choice = (
                f"decode chose token {token} on the GPU, its logits say {logits.argmax()}"
            )

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Engine.embed_image`."""
        return np.concatenate(
            [self._ready.vision(pixels[index : index + 1], pool) for index in range(len(pixels))]
        )

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        self._check_room(inputs_embeds, start)
        ready = self._ready
        if inputs_embeds.shape[1] > 1:
            for at in range(0, inputs_embeds.shape[1], MOST_TOKENS):
                found: NDArray[np.float32] = ready.prefill.run(
                    inputs_embeds[:, at : at + MOST_TOKENS], start + at, 1
                )[0]
            return found
        ready.step.run(inputs_embeds, start, ready.caches)
        logits: NDArray[np.float32] = ready.step.logits(1, ready.caches, start)[0]
        if self.validation is not None:
            self._compare(logits, ready.step.token(ready.caches, start)[0])
        return logits

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """See `Engine.greedy`."""
        self._check_room(inputs_embeds, start)
        ready = self._ready
        ready.step.run(inputs_embeds, start, ready.caches)
        token, mass = ready.step.token(ready.caches, start)
        check_finite(mass)
        return token

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.verify`. Makes several calls if one call cannot return logits for
        all positions.
        """
        self._check_room(inputs_embeds, start)
        length, found = inputs_embeds.shape[1], []
        for at in range(0, length, MOST_ROWS):
            part = inputs_embeds[:, at : at + MOST_ROWS]
            found.append(self._ready.prefill.run(part, start + at, part.shape[1]).copy())
        return np.concatenate(found)

    def _check_room(self, inputs_embeds: NDArray[np.float32], start: int) -> None:
        end = start + inputs_embeds.shape[1]
        assert end <= self.capacity, (
            f"rows {start} to {end} do not fit the cache of {self.capacity}; the session checks "
            f"this before prefill"
        )

    def batch(self, slots: int, rows: int) -> TensorRtBatch:
        """See `Engine.batch`. Each slot has as many rows as the engine's own caches,
        because the decoder was built for that number.
        """
        ready = self._ready
        what = f"the key/value caches of {slots} beams or questions, each"
        spare = [
            Caches(self._machine.device, self._bundle.spec.decoder, ready.caches.most, what)
            for _ in range(slots + (slots > 1))
        ]
        return TensorRtBatch(self._machine, ready.step, ready.caches, spare)


class TensorRtBatch:
    """See `runtime.engines.Batch`: sequences with their own caches, decoded one after
    the other. With several slots, the last of `caches` is a spare for exchanging rows.
    """

    def __init__(
        self, machine: Machine, step: DecodeContext, own: Caches, caches: Sequence[Caches]
    ) -> None:
        self._machine, self._step, self._own, self._caches = machine, step, own, caches

    def fill(self, slot: int, rows: int) -> None:
        """See `Batch.fill`."""
        self._caches[slot].take(self._own, 0, 0, rows)

    def step(
        self, inputs_embeds: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `Batch.step`."""
        assert starts.max() < self._own.most, (
            f"row {starts.max()} does not fit {self._own.most}; the caller asks for enough rows"
        )
        found = []
        for slot, start in enumerate(starts.tolist()):
            self._step.run(inputs_embeds[slot : slot + 1], start, self._caches[slot])
            found.append(self._step.logits(1, self._caches[slot], start).copy())
        return np.concatenate(found)

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """See `Batch.copy`."""
        self._machine.device.check()
        for target, source in _moves(list(sources), len(self._caches) - 1) if start < end else ():
            self._caches[target].take(self._caches[source], start, start, end - start)


def _moves(sources: list[int], spare: int) -> list[tuple[int, int]]:
    """Returns (target, source) copies, in an order that leaves in slot i the earlier
    content of slot sources[i]. Cycles of slots go through the spare slot.
    """
    pending = {target: source for target, source in enumerate(sources) if target != source}
    moves = []
    while pending:
        target = next((target for target in pending if target not in pending.values()), None)
        if target is None:
            target = next(iter(pending))
            moves.append((spare, target))
            pending = {to: spare if source == target else source for to, source in pending.items()}
        moves.append((target, pending.pop(target)))
    return moves
