"""The engines that `benchmarks/peers.py` compares, one module each, and the table of
contenders: engines with their settings.

A module has two functions. `prepare(folder, contender)` makes its files from the common
weights unless they exist. `load(folder, contender, threads)` returns a `Decoder` or a
`Vision`. Modules are imported in worker processes only, so a missing package removes
only the rows of its engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CHECKPOINT",
    "CONTENDERS",
    "CONTEXT",
    "ENGINES",
    "PROMPT",
    "STEPS",
    "Contender",
    "Decoder",
    "Vision",
    "file_bytes",
]

Array = NDArray[np.float32]
CHECKPOINT = "edge"  # the folder of the common weights, named after their preset
PROMPT, STEPS, CONTEXT = 288, 64, 512

ENGINES: dict[str, str] = {
    "ours": "pip install -e .[export]",
    "genai": "pip install onnxruntime-genai",
    "intel": "pip install openvino nncf; pip install optimum-intel",
    "llamacpp": 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python '
    "llama-cpp-python gguf",
    "eager": "pip install torch==2.13.0",
}
"""The modules of this package, and the commands that install their packages."""


class Decoder(Protocol):
    """A loaded decoder with the calls that are timed. Its cache starts empty.

    `weight_bytes` is the size of the weights that one decode step must read;
    `disk_bytes` is the size of all its files.
    """

    weight_bytes: int
    disk_bytes: int

    def reset(self) -> None:
        """Clears the sequence; not timed."""
        ...

    def prefill(self, tokens: list[int]) -> Array:
        """Returns the logits [V] after the last of `tokens`."""
        ...

    def step(self, token: int) -> Array:
        """Returns the logits [V] after one more token."""
        ...


class Vision(Protocol):
    """A loaded vision graph: tower, pooling and adapter."""

    disk_bytes: int

    def embed(self, pixels: Array, pool: Array) -> Array:
        """Returns the image embeddings [T, H]."""
        ...


@dataclass(frozen=True)
class Contender:
    """One row: an engine with a precision. It is compared with contenders of the same
    `family`; `note` describes its settings.
    """

    name: str
    engine: str
    family: str
    part: str = "decoder"
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def ours(self) -> bool:
        """Whether this is the repository's own runtime."""
        return self.engine == "ours"


_ORT = "runtime.load(threads=2), session options of the runtime"
_GENAI = "intra_op_num_threads 2, accuracy level 4, buffer of keys and values shared"
_OPENVINO = (
    "stateful, INFERENCE_NUM_THREADS 2, one stream, LATENCY, pinning off, logits of the "
    "last position"
)
_LLAMA = "threads 2, ubatch 512, mmap, native build, repacked weights"
_EAGER = "set_num_threads(2), scaled_dot_product_attention, inference mode"


def _ours(
    name: str, family: str, *build: str, part: str = "decoder", bundle: str, note: str = _ORT
) -> Contender:
    return Contender(f"ours {name}", "ours", family, part, {"bundle": bundle, "build": build}, note)


def _openvino(family: str, note: str, **options: Any) -> Contender:
    return Contender(
        f"OpenVINO {family}", "intel", family, "decoder", options, f"{_OPENVINO}; {note}"
    )


def _llama(kind: str, family: str, **options: Any) -> Contender:
    return Contender(
        f"llama.cpp {kind}", "llamacpp", family, "decoder", {"kind": kind, **options}, _LLAMA
    )


_MSE = ("--rounding", "mse")
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _ours("int8", "int8", "--precision", "int8", bundle="edge-int8"),
        _ours("int4", "int4", "--precision", "int4", *_MSE, bundle="edge-int4"),
        _ours(
            "int4 block 128",
            "int4",
            "--precision",
            "int4",
            *_MSE,
            "--block",
            "128",
            bundle="edge-int4-128",
        ),
        _ours(
            "int4-hybrid", "int4", "--precision", "int4-hybrid", *_MSE, bundle="edge-int4-hybrid"
        ),
        Contender(
            "onnxruntime-genai int8",
            "genai",
            "int8",
            options={"precision": "int8", "block": 128},
            note=f"{_GENAI}, blocks of 128",
        ),
        Contender(
            "onnxruntime-genai int4",
            "genai",
            "int4",
            options={"precision": "int4", "block": 128},
            note=f"{_GENAI}, blocks of 128",
        ),
        _openvino("int8", "symmetric, per channel", weights=["--weight-format", "int8", "--sym"]),
        _openvino(
            "int4",
            "symmetric, groups of 128",
            weights=["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"],
        ),
        _llama("Q8_0", "int8"),
        _llama("Q4_0", "int4"),
        _llama("Q4_K_M", "int4"),
        Contender("PyTorch fp32", "eager", "fp32", options={"dtype": "float32"}, note=_EAGER),
        Contender("PyTorch bf16", "eager", "bf16", options={"dtype": "bfloat16"}, note=_EAGER),
        _ours("vision int8", "int8", "--precision", "int8", part="vision", bundle="edge-int8"),
        _ours(
            "vision fp32", "fp32", "--precision", "fp32", part="vision", bundle="edge-tower-fp32"
        ),
        Contender(
            "OpenVINO vision int8",
            "intel",
            "int8",
            "vision",
            {"precision": "int8"},
            "nncf, transformer, mixed preset; threads 2, LATENCY",
        ),
        Contender(
            "OpenVINO vision fp32",
            "intel",
            "fp32",
            "vision",
            {"precision": "fp32"},
            "from PyTorch, threads 2, LATENCY, precision hint f32",
        ),
        Contender("PyTorch vision fp32", "eager", "fp32", "vision", {"dtype": "float32"}, _EAGER),
    )
}


def file_bytes(path: Path) -> int:
    """Returns the size of a file, or of all files in a folder, in bytes."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
