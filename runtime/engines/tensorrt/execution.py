"""Binds engines to memory: execution contexts on their profiles, pinned staging buffers
for transfers, and a captured graph for the decode step.

Everything is allocated when an engine is loaded, so that a lack of memory shows then.
All contexts share one block for their activations, because one stream runs them one
after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import EngineError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.contract.spec import ModelSpec
from runtime.engines.tensorrt.cuda import Device, Graph, Memory, aligned
from runtime.engines.tensorrt.graph_variants import DECODE, MOST_ROWS, MOST_TOKENS, PREFILL
from runtime.engines.tensorrt.kv_cache import Caches, Rows
from runtime.engines.tensorrt.trt import Machine
from runtime.output.console import note

__all__ = ["Activations", "DecodeContext", "Prefill", "Vision"]

Array = NDArray[Any]


class Activations:
    """Memory for the activations of all contexts, as large as the most demanding
    profile of the engines needs.
    """

    def __init__(self, machine: Machine, engines: Mapping[str, Any]) -> None:
        sizes = {name: engine.device_memory_size_v2 for name, engine in engines.items()}
        self.memory = machine.device.allocate(
            max(sizes.values()), f"the activations of {max(sizes, key=lambda name: sizes[name])}"
        )


class StagingBuffer:
    """A staging buffer for arrays copied between host and device. It has one pinned
    block and one device block with the same layout, so that one copy moves several
    arrays.
    """

    def __init__(
        self, device: Device, what: str, arrays: Mapping[str, tuple[type, tuple[int, ...]]]
    ) -> None:
        self._device, at = device, 0
        self._places: dict[str, int] = {}
        for name, (dtype, shape) in arrays.items():
            self._places[name] = at
            at += aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._host, self._memory = (
            device.pinned(at, f"the {what} on the host"),
            device.allocate(at, f"the {what}"),
        )
        self.arrays: dict[str, Array] = {
            name: self._host.array(dtype, shape, self._places[name])
            for name, (dtype, shape) in arrays.items()
        }

    def address(self, name: str) -> int:
        """Returns the device address of an array."""
        return self._memory.address + self._places[name]

    def up(self, last: str, count: int) -> None:
        """Queues one copy to the device: all arrays before `last`, and the first
        `count` elements of `last`.
        """
        size = self._places[last] + count * self.arrays[last].itemsize
        self._device.up(self._memory.address, self._host.address, size)

    def down(self, first: str, last: str, count: int) -> None:
        """Queues one copy to the host: the arrays from `first` up to `last`, and of
        `last` only the first `count` elements.
        """
        at = self._places[first]
        size = self._places[last] - at + count * self.arrays[last].itemsize
        self._device.down(self._host.address + at, self._memory.address + at, size)


class _Context:
    """An execution context on one profile."""

    def __init__(
        self, machine: Machine, engine: Any, profile: int, activations: Activations
    ) -> None:
        self._machine, self._engine, self._activations = machine, engine, activations
        self._context = engine.create_execution_context(
            machine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise machine.refusal(f"a context of profile {profile}")
        machine.must(
            self._context.set_optimization_profile_async(profile, machine.device.handle),
            "choosing an optimization profile",
        )
        machine.device.wait()
        memory: Memory = activations.memory
        self._context.set_device_memory(memory.address, memory.size)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Sets the addresses of tensors."""
        for name, address in addresses.items():
            self._machine.must(self._context.set_tensor_address(name, address), f"binding {name}")

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets the shapes of inputs."""
        for name, shape in shapes.items():
            self._machine.must(
                self._context.set_input_shape(name, shape), f"giving {name} the shape {shape}"
            )

    def run(self) -> None:
        """Queues one run of the network."""
        self._machine.device.check()
        self._machine.must(
            self._context.execute_async_v3(self._machine.device.handle), "running the network"
        )


class Vision:
    """Runs the vision engine, one image at a time."""

    def __init__(
        self, machine: Machine, engine: Any, activations: Activations, spec: ModelSpec
    ) -> None:
        self._device, self._grid, self._hidden = (
            machine.device,
            spec.vision.grid**2,
            spec.decoder.hidden,
        )
        size, most = spec.vision.image_size, max(spec.pool_sizes) ** 2
        self._in = StagingBuffer(
            machine.device,
            "pictures",
            {PIXELS: (np.float32, (1, 3, size, size)), POOL: (np.float32, (most, self._grid))},
        )
        self._out = StagingBuffer(
            machine.device, "image embeddings", {IMAGE_EMBEDS: (np.float32, (most, self._hidden))}
        )
        self._context = _Context(machine, engine, 0, activations)
        self._context.bind(
            {name: self._in.address(name) for name in (PIXELS, POOL)}
            | {IMAGE_EMBEDS: self._out.address(IMAGE_EMBEDS)}
        )

    def __call__(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Returns the embeddings [1,T,H] of pixels [1,3,S,S] pooled by [T,s*s]."""
        rows = len(pool)
        self._in.arrays[PIXELS][...] = pixels
        self._in.arrays[POOL][:rows] = pool
        self._context.shape({PIXELS: pixels.shape, POOL: pool.shape})
        self._in.up(POOL, rows * self._grid)
        self._context.run()
        self._out.down(IMAGE_EMBEDS, IMAGE_EMBEDS, rows * self._hidden)
        self._device.wait()
        found: NDArray[np.float32] = self._out.arrays[IMAGE_EMBEDS][None, :rows].copy()
        return found


class _Decoder:
    """Runs the decoder engine on one profile. The plain variant puts new rows into
    `fresh`; the fused one writes them into the caches (`fresh` is None).
    """

    def __init__(
        self,
        machine: Machine,
        engine: Any,
        profile: int,
        activations: Activations,
        spec: ModelSpec,
        sizes: tuple[int, int],
        fresh: Rows | None,
    ) -> None:
        rows, wanted = sizes
        self._device, self._fresh, decoder = machine.device, fresh, spec.decoder
        self._hidden, self._vocabulary = decoder.hidden, decoder.vocab_size
        given = {
            LOGITS_ROWS: (np.int64, (wanted,)),
            POSITION_IDS: (np.int64, (1, rows)),
            INPUTS_EMBEDS: (np.float16, (1, rows, decoder.hidden)),
        }
        found = {
            NEXT_TOKEN: (np.int64, (wanted,)),
            LOGITS_MASS: (np.float32, (wanted,)),
            LOGITS: (np.float32, (wanted, decoder.vocab_size)),
        }
        self._in = StagingBuffer(machine.device, f"inputs of {rows} rows", given)
        self._out = StagingBuffer(machine.device, "logits", found)
        self._context = _Context(machine, engine, profile, activations)
        self._context.bind(
            {name: self._in.address(name) for name in given}
            | {name: self._out.address(name) for name in found}
        )
        self._bound: weakref.ref[Caches] | None = None  # weak: a batch's caches are freed with it

    def _fill(self, inputs_embeds: NDArray[np.float32], start: int) -> None:
        """Writes the embeddings [1,L,H] and their positions into the staging buffer."""
        length = inputs_embeds.shape[1]
        with np.errstate(
            over="ignore"
        ):  # values too large for float16 become infinite, which the logits' mass reveals
            self._in.arrays[INPUTS_EMBEDS][:, :length] = inputs_embeds
        self._in.arrays[POSITION_IDS][0, :length] = np.arange(start, start + length)

    def _shape(self, caches: Caches, length: int, wanted: int) -> None:
        shapes = {
            INPUTS_EMBEDS: (1, length, self._hidden),
            POSITION_IDS: (1, length),
            LOGITS_ROWS: (wanted,),
        }
        self._context.shape(shapes | dict.fromkeys(caches.names, caches.shape))

    def _bind(self, caches: Caches) -> None:
        """Binds the network to these caches, unless it is bound to them already."""
        if self._bound is None or self._bound() is not caches:
            self._context.bind(dict(caches.addresses()))
            if self._fresh is None:
                self._context.bind({present(name): address for name, address in caches.addresses()})
            self._bound = weakref.ref(caches)

    def _place(self, rows: int) -> None:
        """Lays out the buffer for that many new rows, evenly spaced, and binds the
        network to it.
        """
        if self._fresh is not None:
            self._fresh.fit(rows)
            self._context.bind(
                {present(name): address for name, address in self._fresh.addresses()}
            )

    def _settle(self, caches: Caches, start: int, rows: int) -> None:
        """Queues a copy of the new rows into the caches.

        The copy follows the network and is never part of a captured graph, because its
        destination changes with every token. One queued copy costs less than changing a
        node of a graph, and it works with every driver.
        """
        if self._fresh is not None:
            self._fresh.fit(rows)
            caches.take(self._fresh, 0, start, rows)

    def logits(self, wanted: int, caches: Caches, start: int) -> NDArray[np.float32]:
        """Returns the logits [wanted,V] of the last call, which wrote rows from `start`
        on. They are valid until the next call.
        """
        self._out.down(LOGITS_MASS, LOGITS, wanted * self._vocabulary)
        mass, found = self._receive(wanted, caches, start), self._out.arrays[LOGITS][:wanted]
        found[~np.isfinite(mass)] = (
            np.nan
        )  # 8-bit layers can turn non-finite values into numbers, which must not pass as logits
        return found

    def _receive(self, wanted: int, caches: Caches, start: int) -> NDArray[np.float32]:
        """Waits for a call and returns the sums [wanted] of its logits' magnitudes. If
        one is non-finite, the rows that the call wrote may be too and are marked.
        """
        self._device.wait()
        mass: NDArray[np.float32] = self._out.arrays[LOGITS_MASS][:wanted]
        if not np.isfinite(mass).all():
            caches.mark_nonfinite(start)
        return mass


class DecodeContext(_Decoder):
    """Runs the decoder for one token. On the engine's own caches, the step is a
    captured graph: copy the inputs up, run the network, copy the token down.
    """

    def __init__(
        self,
        machine: Machine,
        engine: Any,
        activations: Activations,
        spec: ModelSpec,
        caches: Caches,
        fresh: Rows | None,
    ) -> None:
        super().__init__(machine, engine, DECODE, activations, spec, (1, 1), fresh)
        self._shape(caches, 1, 1)
        self._place(1)
        self._bind(caches)
        self._own = caches
        self._fill(np.zeros((1, 1, self._hidden), np.float32), 0)
        self._in.arrays[LOGITS_ROWS][0] = 0
        self._queue()  # TensorRT must run once before it can be captured
        self._graph: Graph | None
        self._graph, reason = machine.device.capture(self._queue)
        machine.device.wait()
        if self._graph is None:
            note(
                f"the decoding step cannot be captured as a CUDA graph "
                f"({' '.join(reason.split()):.160}); each token takes more CPU time"
            )

    def _queue(self) -> None:
        self._in.up(INPUTS_EMBEDS, self._hidden)
        self._context.run()
        self._out.down(NEXT_TOKEN, LOGITS_MASS, 1)

    def run(self, inputs_embeds: NDArray[np.float32], start: int, caches: Caches) -> None:
        """Queues the step that writes row `start` from inputs [1,1,H]."""
        self._fill(inputs_embeds, start)
        caches.clear_nonfinite(start)
        if self._graph is not None and caches is self._own:
            self._graph.launch()
        else:
            self._bind(caches)
            self._queue()
        self._settle(caches, start, 1)

    def token(self, caches: Caches, start: int) -> tuple[int, NDArray[np.float32]]:
        """Returns the most likely token of the last step and the sum [1] of its logits'
        magnitudes. The sum is finite exactly if all logits are.

        For equal logits, ONNX gives the lowest id, and the graph asks for that.
        TensorRT documents no order of its own for equal values.
        """
        mass = self._receive(1, caches, start)
        token = int(self._out.arrays[NEXT_TOKEN][0])
        if np.isfinite(mass[0]) and not 0 <= token < self._vocabulary:
            raise EngineError(
                f"the GPU chose token {token}, expected 0 to {self._vocabulary - 1}; run "
                f"infmllm-run --self-test, or re-export the bundle"
            )
        return token, mass


class Prefill(_Decoder):
    """Runs the decoder for several tokens at once and returns the logits of some of
    them.
    """

    def __init__(
        self,
        machine: Machine,
        engine: Any,
        activations: Activations,
        spec: ModelSpec,
        caches: Caches,
        fresh: Rows | None,
    ) -> None:
        super().__init__(
            machine,
            engine,
            PREFILL,
            activations,
            spec,
            (min(caches.most, MOST_TOKENS), MOST_ROWS),
            fresh,
        )
        self._bind(caches)
        self._own = caches

    def run(
        self, inputs_embeds: NDArray[np.float32], start: int, wanted: int
    ) -> NDArray[np.float32]:
        """Writes rows from `start` on, from inputs [1,L,H]. Returns the logits
        [wanted,V] of the last `wanted` positions, valid until the next call.
        """
        length = inputs_embeds.shape[1]
        self._fill(inputs_embeds, start)
        self._in.arrays[LOGITS_ROWS][:wanted] = np.arange(length - wanted, length)
        self._shape(self._own, length, wanted)
        self._place(length)
        self._own.clear_nonfinite(start)
        self._in.up(INPUTS_EMBEDS, length * self._hidden)
        self._context.run()
        self._settle(self._own, start, length)
        return self.logits(wanted, self._own, start)
