"""The model specification: `ModelSpec`, the frozen description saved with every
checkpoint and bundle, and the input and output names of the graphs.

`ModelSpec.from_json` accepts only the known fields with valid types and bounds. A
hostile or outdated file therefore raises one `SpecError` instead of a crash later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from runtime.contract.errors import SpecError, kind_name
from runtime.contract.graphs import key_cache, value_cache

__all__ = ["DecoderSpec", "ModelSpec", "VisionSpec"]


_MAX_DIM = 1 << 20
_MAX_LAYERS = 512
_MAX_FLOAT = 1e12
IMAGE_MODES = ("stretch", "pad")

T = TypeVar("T")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise SpecError(f"model spec: {message}")


def _positive(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        _require(
            0 < value <= _MAX_DIM,
            f"{type(spec).__name__}.{name} is {value}, expected 1 to {_MAX_DIM}",
        )


def _read(cls: type[T], data: object, where: str) -> T:
    """Builds a flat dataclass from a JSON object with fields of exactly its types.

    A field with a default may be missing: bundles and checkpoints that were written before
    the field existed stay readable.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"model spec: {where} is {kind_name(type(data))}, expected an object")
    hints = get_type_hints(cls)
    known = fields(cls)  # type: ignore[arg-type]
    names = {f.name for f in known}
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    unknown, missing = sorted(set(map(str, data)) - names), sorted(required - set(data))
    wrong = [
        f"{how} {', '.join(found)[:200]}"
        for how, found in (("unknown fields", unknown), ("missing fields", missing))
        if found
    ]
    _require(
        not wrong,
        f"{where} has {' and '.join(wrong)}; it was changed by hand or written by another version",
    )
    values: dict[str, Any] = {}
    for name in names & set(data):
        value, hint = data[name], hints[name]
        if hint is float and type(value) is int and abs(value) <= _MAX_FLOAT:
            value = float(value)
        if hint == tuple[int, ...]:
            ok = (
                isinstance(value, list | tuple)
                and len(value) <= 64
                and all(type(v) is int for v in value)
            )
            value = tuple(value) if ok else value
        else:
            ok = type(value) is hint or not isinstance(hint, type)
            ok = ok and (hint is not float or 0 < value <= _MAX_FLOAT)
        expected = kind_name(hint) if isinstance(hint, type) else str(hint)
        _require(ok, f"{where}.{name} is {value!r:.60}, expected {expected}")
        values[name] = value
    return cls(**values)


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower: a pre-norm ViT with CLS token and learned absolute positions
    (model-spec: EVA ViT as used by BLIP-2).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    layer_norm_eps: float = 1e-6
    final_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive(self, "image_size", "patch_size", "width", "heads", "mlp_width")
        _require(
            0 < self.layers <= _MAX_LAYERS,
            f"vision.layers is {self.layers}, expected 1 to {_MAX_LAYERS}",
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        _require(
            self.width % self.heads == 0,
            f"vision.width {self.width} is not a multiple of heads {self.heads}",
        )

    @property
    def grid(self) -> int:
        """Patches per side, s = S / patch."""
        return self.image_size // self.patch_size

    @property
    def parameters(self) -> int:
        """Number of parameters of the vision tower."""
        w, block = (
            self.width,
            4 * self.width**2 + 2 * self.width * self.mlp_width + self.mlp_width + 8 * self.width,
        )
        return 3 * self.patch_size**2 * w + w + (self.grid**2 + 2) * w + self.layers * block + 2 * w


@dataclass(frozen=True)
class DecoderSpec:
    """The LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SiLU-gated
    MLP, untied output head.
    """

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden", "heads", "kv_heads", "mlp_width", "context")
        _require(
            0 < self.layers <= _MAX_LAYERS,
            f"decoder.layers is {self.layers}, expected 1 to {_MAX_LAYERS}",
        )
        _require(
            self.hidden % self.heads == 0,
            f"decoder.hidden {self.hidden} is not a multiple of heads {self.heads}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"decoder.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"decoder head dimension {self.head_dim} is odd; rotary positions need an even one",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Names of the graph inputs that hold keys and values, in graph order: keys,
        then values, layer by layer.
        """
        return tuple(
            name for layer in range(self.layers) for name in (key_cache(layer), value_cache(layer))
        )

    @property
    def parameters(self) -> int:
        """Number of parameters of the decoder, including token embeddings and output
        head.
        """
        h, kv = self.hidden, self.kv_heads * self.head_dim
        return (
            2 * self.vocab_size * h
            + h
            + self.layers * (2 * h * h + 2 * h * kv + 3 * h * self.mlp_width + 2 * h)
        )


@dataclass(frozen=True)
class ModelSpec:
    """A complete InfMLLM: vision tower, pool sizes, decoder, preprocessing mode and
    special token ids.

    `pool_sizes` lists each pooled grid side p that the model was trained for, the
    default first. A side p gives p*p visual tokens.
    """

    name: str
    vision: VisionSpec
    decoder: DecoderSpec
    pool_sizes: tuple[int, ...]
    image_mode: str = "stretch"
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.pool_sizes), "pool_sizes is empty, expected at least one p")
        for p in self.pool_sizes:
            self.check_pool_size(p)
        _require(
            self.image_mode in IMAGE_MODES,
            f"image_mode is {self.image_mode!r}, expected one of {IMAGE_MODES}",
        )
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            _require(
                0 <= value < self.decoder.vocab_size,
                f"{name} is {value}, outside the vocabulary of {self.decoder.vocab_size}",
            )

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        adapter = (
            self.vision.width * self.decoder.hidden
            + self.decoder.hidden**2
            + 2 * self.decoder.hidden
        )
        return self.vision.parameters + adapter + self.decoder.parameters

    def check_pool_size(self, p: int) -> None:
        """Raises `SpecError` unless p divides the patch grid."""
        s = self.vision.grid
        _require(0 < p <= s and s % p == 0, f"pool size {p} does not divide the {s}x{s} patch grid")

    def pool_size_for(self, visual_tokens: int | None) -> int:
        """Returns the p that gives `visual_tokens` (p*p) embeddings, or the default p
        for None. Raises `SpecError` that lists the choices.
        """
        if visual_tokens is None:
            return self.pool_sizes[0]
        for p in self.pool_sizes:
            if p * p == visual_tokens:
                return p
        choices = ", ".join(str(p * p) for p in self.pool_sizes)
        raise SpecError(
            f"{self.name} does not support {visual_tokens} visual tokens; choose one of: {choices}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-ready dict, the inverse of `from_json`."""
        return asdict(self) | {"pool_sizes": list(self.pool_sizes)}

    @classmethod
    def from_json(cls, data: object) -> ModelSpec:
        """Reads a spec strictly. Raises `SpecError` on any unknown, missing, mistyped
        or out-of-bounds field.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"model spec: found {kind_name(type(data))}, expected an object")
        parts = dict(data)
        parts["vision"] = _read(VisionSpec, parts.get("vision"), "vision")
        parts["decoder"] = _read(DecoderSpec, parts.get("decoder"), "decoder")
        return _read(cls, parts, "spec")

    @classmethod
    def from_text(cls, text: str | bytes, where: str) -> ModelSpec:
        """Parses JSON text; `where` names the file in error messages."""
        try:
            return cls.from_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise SpecError(
                f"{where} is not valid JSON ({error}); re-create the checkpoint"
            ) from None
