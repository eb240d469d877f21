"""Engines bound to memory: execution contexts on their profiles, pinned staging for
what crosses, a captured graph for the decoding step.

Everything is allocated when an engine is loaded, so that running out of memory happens
then. All contexts share one block for their activations, since one stream runs them one
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

__all__ = ["Activations", "Prefill", "Step", "Vision"]

Array = NDArray[Any]


class Activations:
    """The memory in which contexts compute, as large as the hungriest profile of the
    engines needs.
    """

    def __init__(self, machine: Machine, engines: Mapping[str, Any]) -> None:
        sizes = {name: engine.device_memory_size_v2 for name, engine in engines.items()}
        self.memory = machine.device.allocate(
            max(sizes.values()), f"the activations of {max(sizes, key=lambda name: sizes[name])}"
        )


class _Packet:
    """Arrays that cross between host and device: one pinned block and one on the
    device, laid out alike, so that one copy moves many.
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
        """Where an array is on the device."""
        return self._memory.address + self._places[name]

    def up(self, last: str, count: int) -> None:
        """Queues copying all arrays before `last` to the device, and `count` elements
        of that one.
        """
        size = self._places[last] + count * self.arrays[last].itemsize
        self._device.up(self._memory.address, self._host.address, size)

    def down(self, first: str, last: str, count: int) -> None:
        """Queues copying arrays `first` up to `last` to the host, of that one `count`
        elements.
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
        """Says where tensors are."""
        for name, address in addresses.items():
            self._machine.must(self._context.set_tensor_address(name, address), f"binding {name}")

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Says how large inputs are."""
        for name, shape in shapes.items():
            self._machine.must(
                self._context.set_input_shape(name, shape), f"giving {name} the shape {shape}"
            )

    def run(self) -> None:
        """Queues the network."""
        self._machine.device.check()
        self._machine.must(
            self._context.execute_async_v3(self._machine.device.handle), "running the network"
        )


class Vision:
    """The vision engine, for one picture at a time."""

    def __init__(
        self, machine: Machine, engine: Any, activations: Activations, spec: ModelSpec
    ) -> None:
        self._device, self._grid, self._hidden = (
            machine.device,
            spec.vision.grid**2,
            spec.decoder.hidden,
        )
        size, most = spec.vision.image_size, max(spec.pool_sizes) ** 2
        self._in = _Packet(
            machine.device,
            "pictures",
            {PIXELS: (np.float32, (1, 3, size, size)), POOL: (np.float32, (most, self._grid))},
        )
        self._out = _Packet(
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
        """Embeddings [1,T,H] of pixels [1,3,S,S] pooled by [T,s*s]."""
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
    """The decoder engine on one profile. `fresh` is where the plain form puts new rows;
    the fused one writes into the caches (None).
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
        self._in = _Packet(machine.device, f"inputs of {rows} rows", given)
        self._out = _Packet(machine.device, "logits", found)
        self._context = _Context(machine, engine, profile, activations)
        self._context.bind(
            {name: self._in.address(name) for name in given}
            | {name: self._out.address(name) for name in found}
        )
        self._bound: weakref.ref[Caches] | None = None  # a batch's caches go when it does

    def _fill(self, inputs_embeds: NDArray[np.float32], start: int) -> None:
        """Puts the embeddings [1,L,H] and their positions where the GPU fetches them."""
        length = inputs_embeds.shape[1]
        with np.errstate(
            over="ignore"
        ):  # what half precision cannot hold becomes infinite, which the mass of the call shows
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
        """Has the network work on these caches."""
        if self._bound is None or self._bound() is not caches:
            self._context.bind(dict(caches.addresses()))
            if self._fresh is None:
                self._context.bind({present(name): address for name, address in caches.addresses()})
            self._bound = weakref.ref(caches)

    def _place(self, rows: int) -> None:
        """Has the network put that many new rows where they lie evenly."""
        if self._fresh is not None:
            self._fresh.fit(rows)
            self._context.bind(
                {present(name): address for name, address in self._fresh.addresses()}
            )

    def _settle(self, caches: Caches, start: int, rows: int) -> None:
        """Queues moving new rows into the caches.

        It comes behind the network, never into a captured graph: its destination moves
        with every token, and one queued copy costs less than changing a node of a
        graph, in a way that every driver has.
        """
        if self._fresh is not None:
            self._fresh.fit(rows)
            caches.take(self._fresh, 0, start, rows)

    def logits(self, wanted: int, caches: Caches, start: int) -> NDArray[np.float32]:
        """The logits [wanted,V] of the call before, which wrote rows `start` and on;
        valid until the next.
        """
        self._out.down(LOGITS_MASS, LOGITS, wanted * self._vocabulary)
        mass, found = self._arrived(wanted, caches, start), self._out.arrays[LOGITS][:wanted]
        found[~np.isfinite(mass)] = (
            np.nan
        )  # 8-bit layers make numbers of what is not finite; nobody may take them for logits
        return found

    def _arrived(self, wanted: int, caches: Caches, start: int) -> NDArray[np.float32]:
        """Waits for a call; the sums [wanted] of its logits' magnitudes. If they are
        not finite, neither may be the rows it wrote.
        """
        self._device.wait()
        mass: NDArray[np.float32] = self._out.arrays[LOGITS_MASS][:wanted]
        if not np.isfinite(mass).all():
            caches.spoil(start)
        return mass


class Step(_Decoder):
    """One token. For its own caches the step is a captured graph: a copy up, the
    network, the token down.
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
        self._queue()  # TensorRT wants to have run once before it is captured
        self._graph: Graph | None
        self._graph, reason = machine.device.capture(self._queue)
        machine.device.wait()
        if self._graph is None:
            note(
                f"the decoding step cannot be captured ({' '.join(reason.split()):.160}); each "
                f"token costs more of the CPU's time"
            )

    def _queue(self) -> None:
        self._in.up(INPUTS_EMBEDS, self._hidden)
        self._context.run()
        self._out.down(NEXT_TOKEN, LOGITS_MASS, 1)

    def run(self, inputs_embeds: NDArray[np.float32], start: int, caches: Caches) -> None:
        """Queues the step that writes row `start` from inputs [1,1,H]."""
        self._fill(inputs_embeds, start)
        caches.heal(start)
        if self._graph is not None and caches is self._own:
            self._graph.launch()
        else:
            self._bind(caches)
            self._queue()
        self._settle(caches, start, 1)

    def token(self, caches: Caches, start: int) -> tuple[int, NDArray[np.float32]]:
        """The likeliest token of the step before, and the sum [1] of its logits'
        magnitudes, finite exactly if all of them are.

        Equal logits: ONNX has the lowest id win, and the graph asks for that; TensorRT
        documents no order of its own for equal values.
        """
        mass = self._arrived(1, caches, start)
        token = int(self._out.arrays[NEXT_TOKEN][0])
        if np.isfinite(mass[0]) and not 0 <= token < self._vocabulary:
            raise EngineError(
                f"the GPU chose token {token}, expected 0 to {self._vocabulary - 1}; run "
                f"infmllm-run --self-test, or re-export the bundle"
            )
        return token, mass


class Prefill(_Decoder):
    """Several tokens at once, with the logits of some of them."""

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
        """Writes rows `start` and on from inputs [1,L,H]; the logits [wanted,V] of the
        last `wanted` positions, valid until the next call.
        """
        length = inputs_embeds.shape[1]
        self._fill(inputs_embeds, start)
        self._in.arrays[LOGITS_ROWS][:wanted] = np.arange(length - wanted, length)
        self._shape(self._own, length, wanted)
        self._place(length)
        self._own.heal(start)
        self._in.up(INPUTS_EMBEDS, length * self._hidden)
        self._context.run()
        self._settle(self._own, start, length)
        return self.logits(wanted, self._own, start)
