"""The common weights and inputs: one checkpoint with random weights, its decoder in the
Hugging Face layout, one prompt and one image.

The files of all contenders are made from these, so that their outputs can be compared
and a wrong graph is detected.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contenders import CHECKPOINT, CONTEXT
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec

__all__ = [
    "image_inputs",
    "llama_folder",
    "prompt_tokens",
    "spec_of",
    "tower_checkpoint",
    "write_checkpoint",
]

_FIRST_TOKEN = 3  # lower ids are special tokens
Array = NDArray[np.float32]


def spec_of(folder: Path) -> ModelSpec:
    """Returns the spec of the common checkpoint."""
    path = folder / CHECKPOINT / "config.json"
    return ModelSpec.from_text(path.read_bytes(), str(path))


def prompt_tokens(count: int) -> list[int]:
    """Returns the first `count` tokens of one random sequence, the same for all
    contenders.
    """
    vocabulary = 32000
    return [
        int(token)
        for token in np.random.default_rng(0).integers(_FIRST_TOKEN, vocabulary, size=2 * CONTEXT)[
            :count
        ]
    ]


def image_inputs(folder: Path) -> tuple[Array, Array]:
    """Returns random pixels [1, 3, S, S] and the pooling matrix of the default size."""
    spec = spec_of(folder)
    size = spec.vision.image_size
    pixels = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    return pixels, pool_matrix(spec.vision.grid, spec.pool_sizes[0])


def write_checkpoint(folder: Path) -> None:
    """Writes the common weights (the preset's shape, random from seed 0) unless they
    exist.
    """
    if (folder / CHECKPOINT).exists():
        return
    from trainer.checkpoint import write_random
    from trainer.config import find_preset
    from trainer.datasets.scene_text import corpus
    from trainer.tokenize import build_tokenizer

    write_random(
        folder / CHECKPOINT, find_preset(CHECKPOINT).spec, build_tokenizer(corpus()).to_str()
    )


def llama_folder(folder: Path) -> Path:
    """Returns a Hugging Face LLaMA folder with the decoder in bf16, the checkpoint's
    own type. Writes it unless it exists.
    """
    place = folder / f"{CHECKPOINT}-llama"
    if place.exists():
        return place
    import torch

    from runtime.contract.files import staged_folder
    from trainer.checkpoint import open_checkpoint, write_shards

    stored = open_checkpoint(folder / CHECKPOINT)
    names = [name for name in stored.places if name.startswith("decoder.")]
    spec = stored.spec.decoder
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.mlp_width,
        "max_position_embeddings": spec.context,
        "rope_theta": spec.rope_theta,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": stored.spec.bos_id,
        "eos_token_id": stored.spec.eos_id,
        "pad_token_id": stored.spec.pad_id,
    }
    with staged_folder(place, "config.json") as staged:
        write_shards(
            staged, ((_llama_name(name), stored.read(name).to(torch.bfloat16)) for name in names)
        )
        (staged / "config.json").write_text(json.dumps(config, indent=2))
        (staged / "tokenizer.json").write_bytes(
            (folder / CHECKPOINT / "tokenizer.json").read_bytes()
        )
        (staged / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
    return place


def _llama_name(name: str) -> str:
    rest = name.removeprefix("decoder.")
    return rest if rest.startswith("lm_head") else f"model.{rest}"


def tower_checkpoint(folder: Path) -> Path:
    """Returns a checkpoint with the common tower and adapter and a decoder of one
    layer. It is enough to build a float vision graph, without gigabytes of float
    decoder weights. Writes it unless it exists.
    """
    place = folder / f"{CHECKPOINT}-tower"
    if place.exists():
        return place
    from dataclasses import replace

    import torch

    from runtime.contract.files import staged_folder
    from trainer.checkpoint import open_checkpoint, write_shards

    stored = open_checkpoint(folder / CHECKPOINT)
    spec = replace(
        stored.spec, name=f"{CHECKPOINT}-tower", decoder=replace(stored.spec.decoder, layers=1)
    )
    names = [
        name
        for name in stored.places
        if not name.startswith("decoder.layers.") or name.startswith("decoder.layers.0.")
    ]
    with staged_folder(place, "config.json") as staged:
        write_shards(staged, ((name, stored.read(name).to(torch.bfloat16)) for name in names))
        (staged / "config.json").write_text(json.dumps(spec.to_json(), indent=2))
        (staged / "card.json").write_text(json.dumps(stored.card))
        (staged / "tokenizer.json").write_bytes(
            (folder / CHECKPOINT / "tokenizer.json").read_bytes()
        )
    return place
