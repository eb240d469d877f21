"""Reads and writes checkpoints: folders with `config.json`, `model.safetensors` (or
shards), `tokenizer.json` and `card.json`.

Weights are read from safetensors only; nothing in a checkpoint is executed. Loading is
strict: unknown, mismatched and missing tensors are errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
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

__all__ = [
    "DEMO",
    "Checkpoint",
    "StoredCheckpoint",
    "load_checkpoint",
    "open_checkpoint",
    "read_spec",
    "save_checkpoint",
    "shard_files",
    "write_random",
    "write_shards",
]

DEMO = Path(__file__).parent / "demo"
"""The demo checkpoint shipped with the package."""

CONFIG, WEIGHTS, INDEX, TOKENIZER, CARD = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "card.json",
)

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class StoredCheckpoint:
    """An opened checkpoint whose weights stay on disk until they are read.

    `sha256` identifies its weights, spec and tokenizer together. `places` maps every
    parameter name of the model to the file that holds it.
    """

    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    card: Mapping[str, Any]
    sha256: str
    places: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """Reads one parameter as float32. Raises `CheckpointError` if the file is
        damaged or the parameter has NaN or infinite values.
        """
        shard = self.places[name]
        try:
            with safe_open(shard, framework="pt") as file:
                tensor = file.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} cannot be read ({error}); copy the checkpoint again"
            ) from None
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.path} holds NaN or infinite values in {name}; train or import it again"
            )
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; see `StoredCheckpoint`."""

    path: Path
    model: InfMLLM
    tokenizer: Tokenizer
    card: Mapping[str, Any]
    sha256: str


def read_spec(path: Path) -> ModelSpec:
    """Reads the spec of a checkpoint folder. Raises `CheckpointError` or `SpecError`."""
    config = path / CONFIG
    if not config.is_file():
        raise CheckpointError(
            f"no checkpoint at {path} ({CONFIG} not found); train one with: infmllm-train "
            f"--preset nano --out {path}"
        )
    return ModelSpec.from_text(config.read_bytes(), str(config))


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Opens a checkpoint folder without reading its weights; their names and shapes are
    checked. Raises `CheckpointError` or `SpecError`.
    """
    spec = read_spec(path)
    shards = _shards(path)
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in InfMLLM(spec).state_dict().items()
        }
    places = _places(shards, expected, path)
    try:
        tokenizer = Tokenizer.load(path / TOKENIZER, spec)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    try:
        card = json.loads((path / CARD).read_bytes()) if (path / CARD).is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / CARD} is not valid JSON ({error}); copy the checkpoint again"
        ) from None
    return StoredCheckpoint(path, spec, tokenizer, card, _identity(path, shards), places)


def load_checkpoint(path: Path) -> Checkpoint:
    """Loads a whole checkpoint folder with the weights in float32. Raises
    `CheckpointError`, or `SpecError` for its config.
    """
    stored = open_checkpoint(path)
    model = InfMLLM(stored.spec)
    model.load_state_dict({name: stored.read(name) for name in stored.places})
    return Checkpoint(path, model.eval(), stored.tokenizer, stored.card, stored.sha256)


def _identity(path: Path, shards: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in (path / CONFIG, path / TOKENIZER, *shards):
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _shards(path: Path) -> list[Path]:
    """Returns the weight files: the single file, or the shards that the index names.
    Shard names must be plain file names in this folder.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} has neither {WEIGHTS} nor {INDEX}; convert pickle files (.pth, .bin) with: "
            f"infmllm-export import"
        )
    return shard_files(path / INDEX)


def shard_files(index: Path) -> list[Path]:
    """Returns the files that a shard index names. Raises `CheckpointError` if a name is
    not a plain file name or the file does not exist in the index's folder.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of weight files ({error}); copy the checkpoint again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index} refers to a file outside the checkpoint: {name!r:.80}; do not use it"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name} is missing, but the index lists it; copy the checkpoint "
                f"again"
            )
    return [index.parent / name for name in names]


def _places(
    shards: list[Path], expected: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Path]:
    """Returns the shard of each parameter after a strict check of names and shapes."""
    places: dict[str, Path] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                names = file.keys()  # safe_open is not a mapping
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} cannot be read ({error}); copy the checkpoint again"
            ) from None
        for name, shape in shapes.items():
            if expected.get(name) != shape:
                raise CheckpointError(
                    f"{shard}: tensor {name} {shape} {_fault(name, expected)}; these weights do "
                    f"not belong to this config.json"
                )
            places[name] = shard
    missing = sorted(set(expected) - set(places))
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}; copy the "
            f"checkpoint again"
        )
    return places


def _fault(name: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    return f"should be {expected[name]}" if name in expected else "is unknown"


def save_checkpoint(
    path: Path,
    model: InfMLLM,
    tokenizer_json: str,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a checkpoint atomically, with its weights converted to `dtype`.

    The conversion rounds values, so evaluate the saved checkpoint, not the model in
    memory. Raises `CheckpointError` if a value is not finite as `dtype`.
    """
    weights = {
        name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    bad = sorted(name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all()))
    if bad:
        raise CheckpointError(
            f"{', '.join(bad[:3])} contain values that are not finite in {dtype}; nothing was "
            f"written to {path}"
        )
    with staged_folder(path, CONFIG) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / TOKENIZER).write_text(tokenizer_json)
        (folder / CONFIG).write_text(json.dumps(model.spec.to_json(), indent=2) + "\n")
        (folder / CARD).write_text(json.dumps(dict(card), indent=2) + "\n")


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes named tensors as they arrive, in files of at most `shard_bytes` (or one
    larger tensor). Writes an index if there is more than one file.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1) + "\n")


def write_random(
    path: Path,
    spec: ModelSpec,
    tokenizer_json: str,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a checkpoint with random weights, one tensor at a time. It can start a
    training run, or stand in for a model size that has no trained checkpoint.
    """
    with torch.device("meta"):
        model = InfMLLM(spec)
    generator = torch.Generator().manual_seed(seed)
    with staged_folder(path, CONFIG) as folder:
        write_shards(
            folder,
            (
                (name, model.initial(name, p.shape, generator).to(dtype))
                for name, p in model.named_parameters()
            ),
        )
        (folder / TOKENIZER).write_text(tokenizer_json)
        (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n")
        (folder / CARD).write_text(
            json.dumps(
                {"recipe": "random", "seed": seed, "data": [{"name": "synthetic"}]}, indent=2
            )
            + "\n"
        )
