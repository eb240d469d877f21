"""Reads tensors one at a time from safetensors, and from pickled files only through
`weights_only` and a memory map.

Nothing in a file is executed, and a tensor is in memory only while its caller holds it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.contract.errors import CheckpointError
from trainer.checkpoint import shard_files

__all__ = ["Stored", "WeightFiles", "open_weights"]

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
_STRIPPED = ("module.", "base_model.model.")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor] = field(repr=False)


WeightFiles = Mapping[str, Stored]


def open_weights(path: Path) -> dict[str, Stored]:
    """Opens all tensors of a file, or of a folder's shards, by name. Removes the prefix
    `module.` and LoRA wrapper prefixes. Raises `CheckpointError`.
    """
    files = _files(path)
    found: dict[str, Stored] = {}
    for file in files:
        stored = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        for name, tensor in stored.items():
            name = _strip(name)
            if name in found:
                raise CheckpointError(
                    f"{file}: tensor {name} is also in {found[name].file}; remove one of them"
                )
            found[name] = tensor
    adapters = sorted(name for name in found if "lora_" in name)
    if adapters:
        raise CheckpointError(
            f"{path} has {len(adapters)} LoRA tensors, such as {adapters[0]}; merge them into "
            f"the weights first (peft: merge_and_unload)"
        )
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in _INDEXES:
        if (path / name).is_file():
            return shard_files(path / name)
    for name in _SINGLE:
        if (path / name).is_file():
            return [path / name]
    raise CheckpointError(
        f"{path} has none of {', '.join((*_SINGLE, *_INDEXES))}; give the folder or file with "
        f"the weights"
    )


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()  # safe_open is not a mapping
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        return read

    return {name: Stored(file, shape, reader(name)) for name, shape in shapes.items()}


def _pickled(file: Path) -> dict[str, Stored]:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be memory-mapped. They are
        # read whole, once.
        data = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (
        OSError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({reason}); nothing in it was executed. Save "
            f"it as safetensors"
        ) from None
    data = _unwrap(data)
    tensors = (
        {name: value for name, value in data.items() if isinstance(value, Tensor)}
        if isinstance(data, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{file} contains no named tensors; give the file with the model's weights"
        )
    return {
        str(name): Stored(file, tuple(value.shape), lambda value=value: value)  # type: ignore[misc]
        for name, value in tensors.items()
    }


def _unwrap(data: object) -> object:
    """Returns the mapping of tensors inside the usual wrappers."""
    while isinstance(data, Mapping):
        inner = [data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)]
        if not inner:
            break
        data = inner[0]
    return data


def _strip(name: str) -> str:
    changed = True
    while changed:
        changed = False
        for prefix in _STRIPPED:
            if name.startswith(prefix):
                name, changed = name.removeprefix(prefix), True
    return name.replace(".base_model.model.", ".")
