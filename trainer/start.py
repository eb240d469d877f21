"""The starting point of a run: random weights from a seed, or a checkpoint, optionally
with another image size and more tokenizer words.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor
from torch.nn import functional as F

from runtime.contract.errors import UsageError
from runtime.contract.spec import ModelSpec
from runtime.contract.tokenizer import Tokenizer
from trainer.checkpoint import TOKENIZER, load_checkpoint
from trainer.datasets.scene_text import corpus
from trainer.model import InfMLLM
from trainer.tokenize import build_tokenizer

__all__ = [
    "Start",
    "begin",
    "extended",
    "new_start",
    "resized",
    "resized_positions",
    "start_from_checkpoint",
]

_VOCABULARY_STEP, _MAX_WORDS = 64, 2000
_WORD = re.compile("[A-Za-z]+")


@dataclass(frozen=True)
class Start:
    """A model in training mode with its tokenizer, both loaded and as JSON text. `card`
    is the card of the source checkpoint, empty for new weights.
    """

    model: InfMLLM
    tokenizer: Tokenizer
    tokenizer_json: str
    identity: str
    card: Mapping[str, Any] = field(default_factory=dict)


def begin(
    spec: ModelSpec, seed: int, path: Path | None, image_size: int | None, new_words: Sequence[str]
) -> Start:
    """Returns random weights for `spec`, or the checkpoint at `path` if given. Raises
    `UsageError` if `image_size` or `new_words` is given without a checkpoint.
    """
    if path is not None:
        return start_from_checkpoint(path, image_size, new_words)
    if image_size or new_words:
        raise UsageError(
            "--image-size and --new-words need a checkpoint to change; give --start-from CHECKPOINT"
        )
    return new_start(spec, seed)


def new_start(spec: ModelSpec, seed: int) -> Start:
    """Returns a model with random weights and the tokenizer of the synthetic scenes."""
    inner = build_tokenizer(corpus())
    return Start(
        InfMLLM(spec, torch.Generator().manual_seed(seed)),
        Tokenizer(inner, spec),
        inner.to_str(),
        "new weights",
    )


def start_from_checkpoint(
    path: Path, image_size: int | None = None, new_words: Sequence[str] = ()
) -> Start:
    """Returns a checkpoint's model. `image_size` resizes its position table;
    `new_words` are texts whose words the tokenizer learns.
    """
    checkpoint = load_checkpoint(path)
    model, tokenizer_json = checkpoint.model, (path / TOKENIZER).read_text()
    if image_size is not None:
        model = resized(model, image_size)
    if new_words:
        model, tokenizer_json = extended(model, RawTokenizer.from_str(tokenizer_json), new_words)
    model.train()
    return Start(
        model,
        Tokenizer(RawTokenizer.from_str(tokenizer_json), model.spec),
        tokenizer_json,
        checkpoint.sha256,
        checkpoint.card,
    )


def resized_positions(table_1LC: Tensor, grid: int) -> Tensor:
    """Returns the position table resized to another patch grid. The CLS row is kept;
    the patch rows are interpolated (bicubic, as published).
    """
    old = round((table_1LC.shape[1] - 1) ** 0.5)
    if old == grid:
        return table_1LC
    cls, patches = table_1LC[:, :1], table_1LC[:, 1:]
    square = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.permute(0, 2, 3, 1).flatten(1, 2).to(table_1LC.dtype)], dim=1)


def resized(model: InfMLLM, image_size: int) -> InfMLLM:
    """Returns the model for another image size, with pooling to the whole grid and, if
    the grid is even, to half of it. Raises `SpecError` if the size does not fit.
    """
    vision = replace(model.spec.vision, image_size=image_size)
    grid = vision.grid
    spec = replace(
        model.spec, vision=vision, pool_sizes=(grid, grid // 2) if grid % 2 == 0 else (grid,)
    )
    weights = model.state_dict()
    weights["vision_tower.pos_embed"] = resized_positions(weights["vision_tower.pos_embed"], grid)
    return _fill(spec, weights)


def extended(model: InfMLLM, old: RawTokenizer, texts: Sequence[str]) -> tuple[InfMLLM, str]:
    """Returns the model and a tokenizer that also knows the words of `texts`, at most
    the 2000 most frequent.

    Embedding rows of tokens in both tokenizers are copied. A new token starts as the
    mean of the old tokens that spelt it. Only tokenizers made by `build_tokenizer` can
    be extended, because the training texts of others are not known. Raises `UsageError`
    for other tokenizers.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    new = build_tokenizer(corpus(), [word for word, _ in counts.most_common(_MAX_WORDS)])
    if json.loads(old.to_str())["pre_tokenizer"] != json.loads(new.to_str())["pre_tokenizer"]:
        raise UsageError(
            "this checkpoint's tokenizer was not built by infmllm-train and cannot learn words; "
            "leave out --new-words"
        )
    vocabulary = -(-new.get_vocab_size() // _VOCABULARY_STEP) * _VOCABULARY_STEP
    spec = replace(
        model.spec,
        decoder=replace(
            model.spec.decoder, vocab_size=max(vocabulary, model.spec.decoder.vocab_size)
        ),
    )
    before, weights = old.get_vocab(), model.state_dict()
    for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
        table = weights[name]
        grown = table.mean(0, keepdim=True).repeat(spec.decoder.vocab_size, 1)
        for token, row in new.get_vocab().items():
            if token in before:
                grown[row] = table[before[token]]
            elif pieces := old.encode(new.decode([row]), add_special_tokens=False).ids:
                grown[row] = table[pieces].mean(0)
        weights[name] = grown
    return _fill(spec, weights), new.to_str()


def _fill(spec: ModelSpec, weights: dict[str, Tensor]) -> InfMLLM:
    model = InfMLLM(spec)
    model.load_state_dict(weights)
    return model
