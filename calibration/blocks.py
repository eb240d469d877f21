"""Runs a checkpoint block by block from disk. Only one block's weights are in memory,
so a 7-billion-parameter model needs memory for a single layer.

All cases pass through a block before the next block is read. Every reference value,
range and second moment comes from this run, in float32 and without a cache: the
simplest form of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.samples import Case
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from trainer.decoder import rotary_tables, rotate_half
from trainer.model import InfMLLM

__all__ = ["Block", "LinearGroup", "Reader", "StreamedModel", "Trace"]

Reader = Callable[[str], Tensor]
"""Reads a parameter by name as float32."""


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that share one input, by module name, and the layer that can absorb
    a scale of that input.

    `norm` is the norm that produces the input. `rows` is the linear layer to whose
    output channels the input is proportional. If both are empty, no layer can absorb a
    scale.
    """

    linears: tuple[str, ...]
    norm: str = ""
    rows: str = ""


@dataclass
class Trace:
    """The state of one case between two blocks.

    `x` is the input of the next block. `image_embeds` [T,H] and `logits` [n+1,V] are
    set once they are known.
    """

    case: Case
    x: Tensor
    image_embeds: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Block:
    """A section of the model: the parameters it needs (name prefixes), its linear
    layers, and the function that runs a case through it.
    """

    name: str
    prefixes: tuple[str, ...]
    run: Callable[[Trace], None] = field(repr=False)
    feeds: tuple[LinearGroup, ...] = ()
    norms: tuple[str, ...] = ()


Observer = Callable[[Block, InfMLLM], AbstractContextManager[None]]


class StreamedModel:
    """The blocks of a model. `read` supplies the weights when they are needed, `rotary` the
    tables of rotations if they are not the model's own.
    """

    def __init__(
        self, spec: ModelSpec, read: Reader, rotary: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.spec, self._read = spec, read
        with torch.device("meta"):
            self.model = InfMLLM(spec).eval()
        self._names = list(self.model.state_dict())
        cos, sin = rotary or rotary_tables(spec.decoder)
        self.rotate = lambda x: rotate_half(x, cos, sin, torch.arange(x.shape[2])[None])

    def blocks(self) -> list[Block]:
        """Returns all blocks in order: patch embedding, tower, adapter, token
        embeddings, decoder layers, head.
        """
        tower, decoder = self.spec.vision, self.spec.decoder
        return [
            Block(
                "vision_tower.embed",
                ("vision_tower.patch_embed", "vision_tower.cls_token", "vision_tower.pos_embed"),
                self._embed_patches,
            ),
            *(self._vision_block(f"vision_tower.blocks.{i}", i) for i in range(tower.layers)),
            self._adapter(),
            Block("decoder.embed_tokens", ("decoder.embed_tokens",), self._embed_prompt),
            *(self._decoder_layer(f"decoder.layers.{i}", i) for i in range(decoder.layers)),
            Block(
                "decoder.lm_head",
                ("decoder.norm", "decoder.lm_head"),
                self._head,
                (LinearGroup(("decoder.lm_head",), "decoder.norm"),),
                ("decoder.norm",),
            ),
        ]

    @torch.no_grad()
    def run_blockwise(
        self,
        cases: Sequence[Case],
        observe: Observer | None = None,
        progress: Callable[[Block], None] = lambda block: None,
        unseen: int = 0,
    ) -> list[Trace]:
        """Runs all cases through all blocks and returns their traces.

        `observe` wraps each block's run while its weights are loaded. The first
        `unseen` cases run outside it.
        """
        traces = [Trace(case, torch.from_numpy(case.pixels)) for case in cases]
        for block in self.blocks():
            progress(block)
            with self.loaded(block):
                for trace in traces[:unseen]:
                    block.run(trace)
                with observe(block, self.model) if observe else contextlib.nullcontext():
                    for trace in traces[unseen:]:
                        block.run(trace)
        return traces

    @contextlib.contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """Keeps a block's parameters in memory while the context is open."""
        names = [
            name
            for name in self._names
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in block.prefixes)
        ]
        try:
            for name in names:
                self._assign(name, self._read(name))
            yield
        finally:
            for name in names:
                self._assign(name, torch.empty(self.model.get_parameter(name).shape, device="meta"))

    def _assign(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))

    def _embed_patches(self, trace: Trace) -> None:
        trace.x = self.model.vision_tower.embed(trace.x)

    def _vision_block(self, name: str, index: int) -> Block:
        module = self.model.vision_tower.blocks[index]

        def run(trace: Trace) -> None:
            trace.x = module(trace.x)

        attention = (
            LinearGroup((f"{name}.attn.qkv",), f"{name}.norm1"),
            LinearGroup((f"{name}.attn.proj",)),
        )
        feeds = (
            *attention,
            LinearGroup((f"{name}.mlp.fc1",), f"{name}.norm2"),
            LinearGroup((f"{name}.mlp.fc2",)),
        )
        return Block(name, (name,), run, feeds, (f"{name}.norm1", f"{name}.norm2"))

    def _adapter(self) -> Block:
        def run(trace: Trace) -> None:
            pool = torch.from_numpy(pool_matrix(self.spec.vision.grid, trace.case.pool_size))
            trace.x = self.model.pool_adapter(self.model.vision_tower.finish(trace.x), pool)
            trace.image_embeds = trace.x[0].numpy()

        # Pooling mixes tokens but not channels, so the last norm of the tower can absorb
        # a scale of the adapter's input.
        feeds = (
            LinearGroup(("pool_adapter.fc1",), "vision_tower.norm"),
            LinearGroup(("pool_adapter.fc2",)),
        )
        return Block(
            "pool_adapter",
            ("vision_tower.norm", "pool_adapter"),
            run,
            feeds,
            ("vision_tower.norm",),
        )

    def _embed_prompt(self, trace: Trace) -> None:
        case = trace.case
        trace.x = self.model.sequence(case.before, trace.x[0], [*case.after, *case.answer])

    def _decoder_layer(self, name: str, index: int) -> Block:
        module = self.model.decoder.layers[index]

        def run(trace: Trace) -> None:
            length = trace.x.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            trace.x = module(trace.x, self.rotate, mask, torch.arange(length)[None], None)[0]

        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        feeds = (
            LinearGroup(
                (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                f"{name}.input_layernorm",
            ),
            LinearGroup((f"{attention}.o_proj",)),
            LinearGroup((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{name}.post_attention_layernorm"),
            LinearGroup((f"{mlp}.down_proj",), rows=f"{mlp}.up_proj"),
        )
        return Block(
            name,
            (name,),
            run,
            feeds,
            (f"{name}.input_layernorm", f"{name}.post_attention_layernorm"),
        )

    def _head(self, trace: Trace) -> None:
        decoder = self.model.decoder
        trace.x = trace.x[:, -len(trace.case.answer) - 1 :]
        trace.logits = decoder.lm_head(decoder.norm(trace.x))[0].numpy()
