"""Checkpoints: a folder with `config.json`, `model.safetensors` (or shards), `tokenizer.json` and `card.json`, read strictly.

Only safetensors are read; nothing in a checkpoint is executed. Unknown, missing or mismatched tensors are one error that lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.contract.errors import BundleError, CheckpointError
from runtime.contract.files import sha256_file, staged_folder
from runtime.contract.spec import ModelSpec
from runtime.contract.tokenizer import Tokenizer
from trainer.model import InfMLLM

__all__ = ["DEMO", "Checkpoint", "load_checkpoint", "save_checkpoint", "shard_files"]

DEMO = Path(__file__).parent / "demo"
"""The demo checkpoint shipped with the package."""

CONFIG, WEIGHTS, INDEX, TOKENIZER, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "card.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `sha256` identifies its weights, spec and tokenizer together."""

    path: Path
    model: InfMLLM
    tokenizer: Tokenizer
    card: Mapping[str, Any]
    sha256: str


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; weights become fp32. Raises `CheckpointError` (or `SpecError` for its config)."""
    config = path / CONFIG
    if not config.is_file():
        raise CheckpointError(f"no checkpoint at {path} ({CONFIG} not found); train one with: infmllm-train --preset nano --out {path}")
    spec = ModelSpec.from_text(config.read_bytes(), str(config))
    shards = _shards(path)
    with torch.device("meta"):
        model = InfMLLM(spec)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _read(shards, expected, path)
    model = InfMLLM(spec)
    model.load_state_dict(weights)
    model.eval()
    try:
        tokenizer = Tokenizer.load(path / TOKENIZER, spec)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    try:
        card = json.loads((path / CARD).read_bytes()) if (path / CARD).is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CARD} is not valid JSON ({error}); copy the checkpoint again") from None
    return Checkpoint(path, model, tokenizer, card, _identity(path, shards))


def _identity(path: Path, shards: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in (path / CONFIG, path / TOKENIZER, *shards):
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _shards(path: Path) -> list[Path]:
    """Weight files: the single one, or those the index names (plain names in this folder only)."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}; pickle files are not read, use: infmllm-export import")
    return shard_files(path / INDEX)


def shard_files(index: Path) -> list[Path]:
    """The files an index of shards names: plain names of existing files in its folder. Raises `CheckpointError`."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error}); copy the checkpoint again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names files outside the checkpoint: {name!r:.80}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, its index names it; copy the checkpoint again")
    return [index.parent / name for name in names]


def _read(shards: list[Path], expected: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in expected and tuple(file.get_slice(name).get_shape()) == expected[name]:
                        weights[name] = file.get_tensor(name).float()
                    else:
                        shape = tuple(file.get_slice(name).get_shape())
                        raise CheckpointError(f"{shard}: tensor {name} {shape} {_fault(name, expected)}; it was made for another config")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} cannot be read ({error}); copy the checkpoint again") from None
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}; copy the checkpoint again")
    bad = sorted(name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all()))
    if bad:
        raise CheckpointError(f"{path} holds NaN or infinite values in {', '.join(bad[:3])}; train or import it again")
    return weights


def _fault(name: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    return f"should be {expected[name]}" if name in expected else "is unknown"


def save_checkpoint(path: Path, model: InfMLLM, tokenizer_json: str, card: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Writes a checkpoint atomically, weights as `dtype` (values are rounded; evaluate what was saved, not what was trained)."""
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    bad = sorted(name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all()))
    if bad:
        raise CheckpointError(f"{', '.join(bad[:3])} hold values that are not finite as {dtype}; nothing was written to {path}")
    with staged_folder(path, CONFIG) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / TOKENIZER).write_text(tokenizer_json)
        (folder / CONFIG).write_text(json.dumps(model.spec.to_json(), indent=2) + "\n")
        (folder / CARD).write_text(json.dumps(dict(card), indent=2) + "\n")
