"""Converts the parts of a model to an InfMLLM checkpoint. Tensors are read, converted
and written shard by shard, and no tensor is ignored silently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.contract.errors import BundleError, CheckpointError, UsageError
from runtime.contract.files import staged_folder
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec
from runtime.contract.tokenizer import Tokenizer
from runtime.output.console import track
from trainer.checkpoint import CARD, CONFIG, SHARD_BYTES, TOKENIZER, write_shards
from trainer.imports.files import open_weights
from trainer.imports.layouts import Part, decoder_part, finite, pooler_part, vision_part
from trainer.model import InfMLLM

__all__ = ["DTYPES", "ImportOptions", "import_checkpoint"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_POOL_SIZES = (16, 8, 32, 4)  # a model gets those that divide its grid, in this order


@dataclass(frozen=True)
class ImportOptions:
    """The options of an import. `source` is a raw InfMLLM checkpoint, or a LLaMA folder
    combined with the vision tower that `vision` names.
    """

    source: Path
    out: Path
    vision: Path | None = None
    tokenizer: Path | None = None
    image_size: int | None = None
    vision_heads: int | None = None
    decoder_heads: int | None = None
    image_mode: str = "stretch"
    dtype: str = "fp16"
    seed: int = 0
    shard_bytes: int = SHARD_BYTES


def import_checkpoint(options: ImportOptions) -> tuple[ModelSpec, list[str]]:
    """Writes a checkpoint. Returns its spec and the names of tensors that the source
    lacks and that are therefore new.

    Raises `CheckpointError` for unknown, missing or mismatched tensors, or
    `UsageError`. In that case nothing is written to `out`.
    """
    if options.dtype not in DTYPES:
        raise UsageError(f"unknown dtype {options.dtype!r}; choose one of: {', '.join(DTYPES)}")
    weights, config = open_weights(options.source), _config(options.source)
    raw = any(name.startswith("visual_encoder.") for name in weights)
    if not raw and options.vision is None:
        raise UsageError(f"{options.source} has no vision tower; give one with --vision")
    towers = open_weights(options.vision) if options.vision else weights
    tower_config: dict[str, Any] = (
        dict(_config(options.vision or options.source)) if options.vision else {}
    )
    if options.vision_heads:
        tower_config = {
            **tower_config,
            "vision_config": {
                **tower_config.get("vision_config", tower_config),
                "num_attention_heads": options.vision_heads,
            },
        }
    vision = vision_part(towers, tower_config, options.image_size)
    decoder = decoder_part(weights, config, options.decoder_heads)
    pooler = pooler_part(weights)
    used = (
        decoder.used
        | (pooler.used if pooler else frozenset())
        | (vision.used if not options.vision else frozenset())
    )
    unknown = sorted(set(weights) - used)
    if options.vision and raw:
        unknown = [
            name for name in unknown if not name.startswith(("visual_encoder.", "ln_vision."))
        ]  # replaced by --vision
    if unknown:
        raise CheckpointError(
            f"{options.source} has {len(unknown)} unknown tensors, such as "
            f"{', '.join(unknown[:3])}; only InfMLLM and LLaMA weights can be imported"
        )
    spec = _spec(options, vision.spec, decoder.spec, config)
    parts = [vision, decoder, *([pooler] if pooler else [])]
    new = _write(options, spec, parts, _tokenizer(options))
    return spec, new


def _config(path: Path) -> Mapping[str, Any]:
    """Returns a Hugging Face folder's configuration, or an empty mapping if there is
    none.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    return data


def _spec(
    options: ImportOptions, vision: VisionSpec, decoder: DecoderSpec, config: Mapping[str, Any]
) -> ModelSpec:
    pools = tuple(p for p in _POOL_SIZES if p <= vision.grid and vision.grid % p == 0) or (
        vision.grid,
    )
    ids = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        value = (
            value[0] if isinstance(value, list) and value else value
        )  # newer folders list several ids; the first is the usual one
        if isinstance(value, int) and value >= 0:  # older folders write -1 for none
            ids[f"{name}_id"] = value
    return ModelSpec(options.out.name, vision, decoder, pools, options.image_mode, **ids)


def _tokenizer(options: ImportOptions) -> Path:
    folder = options.tokenizer or (
        options.source if options.source.is_dir() else options.source.parent
    )
    path = folder / TOKENIZER if folder.is_dir() else folder
    if path.name == "tokenizer.model" or not path.is_file():
        hint = (
            "convert it once: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
        raise CheckpointError(
            f"no {TOKENIZER} at {folder}; give its folder with --tokenizer. If there is only a "
            f"tokenizer.model, {hint}"
        )
    return path


def _tensors(
    options: ImportOptions, spec: ModelSpec, parts: list[Part], new: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the model in order, converted. Adapter and final-norm
    tensors that no part has are initialised from the seed and added to `new`.
    """
    sources = {name: source for part in parts for name, source in part.sources.items()}
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in InfMLLM(spec).state_dict().items()
        }
    generator = torch.Generator().manual_seed(options.seed)
    for name, shape in track(expected.items(), len(expected), "importing"):
        if name in sources:
            tensor = sources[name].read()
        elif name.startswith(("pool_adapter.", "vision_tower.norm.")):
            new.append(name)
            plain = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            tensor = (
                torch.randn(shape, generator=generator) * shape[1] ** -0.5
                if len(shape) > 1
                else plain
            )
        else:
            raise CheckpointError(
                f"{options.source} has no tensor {name}; check that all weight files are there"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)} in {sources[name].stored.file}, expected "
                f"{shape}"
            )
        yield name, finite(name, tensor, DTYPES[options.dtype])


def _write(
    options: ImportOptions, spec: ModelSpec, parts: list[Part], tokenizer: Path
) -> list[str]:
    try:
        Tokenizer.load(tokenizer, spec)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    new: list[str] = []
    with staged_folder(options.out, CONFIG) as folder:
        write_shards(folder, _tensors(options, spec, parts, new), options.shard_bytes)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n")
        names = {
            "source": options.source.name,
            "vision": options.vision.name if options.vision else None,
        }
        card = {"preset": None, "imported": names | {"dtype": options.dtype, "new_tensors": new}}
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return new
