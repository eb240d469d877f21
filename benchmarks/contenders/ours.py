"""This repository: bundles built by `infmllm-export build` and run through
`runtime.load`.

The session always holds the vision graph too, so memory and load time are those of the
whole model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from contenders import CHECKPOINT, CONTEXT, Contender, file_bytes
from contenders.weights import tower_checkpoint, write_checkpoint
from runtime import load as load_session
from runtime.contract.bundle import EMBEDDINGS, VISION

__all__ = ["OurDecoder", "OurVision", "load", "prepare", "versions"]

_BUILD = "from export.cli import main; main()"
Array = NDArray[np.float32]


class OurDecoder:
    """See `contenders.Decoder`."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._engine = load_session(bundle, threads=threads, context=CONTEXT).engine
        self._table = np.load(bundle / EMBEDDINGS, mmap_mode="r")
        self._position = 0
        self.disk_bytes = file_bytes(bundle)
        self.weight_bytes = _decoder_bytes(bundle)

    def reset(self) -> None:
        """See `contenders.Decoder`."""
        self._position = 0

    def prefill(self, tokens: list[int]) -> Array:
        """See `contenders.Decoder`."""
        rows = np.asarray(self._table[tokens], np.float32)[None]
        logits = self._engine.forward(rows, self._position)
        self._position += len(tokens)
        return logits

    def step(self, token: int) -> Array:
        """See `contenders.Decoder`."""
        return self.prefill([token])


class OurVision:
    """See `contenders.Vision`."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._engine = load_session(bundle, threads=threads, context=CONTEXT).engine
        self.disk_bytes = sum(file_bytes(file) for file in bundle.glob(f"{Path(VISION).stem}*"))

    def embed(self, pixels: Array, pool: Array) -> Array:
        """See `contenders.Vision`."""
        return np.asarray(self._engine.embed_image(pixels, pool)[0])


def _decoder_bytes(bundle: Path) -> int:
    """Returns the bytes of the decoder graph and of its weight files."""
    return sum(file_bytes(file) for file in bundle.glob("decoder*"))


def prepare(folder: Path, contender: Contender) -> None:
    """Builds the contender's bundle unless it exists."""
    write_checkpoint(folder)
    bundle = folder / contender.options["bundle"]
    if bundle.exists():
        return
    checkpoint = tower_checkpoint(folder) if "tower" in bundle.name else folder / CHECKPOINT
    arguments = [
        "build",
        str(checkpoint),
        *contender.options["build"],
        "--samples",
        "4",
        "--questions",
        "0",
        "-o",
        str(bundle),
    ]
    subprocess.run([sys.executable, "-c", _BUILD, *arguments], check=True)


def load(folder: Path, contender: Contender, threads: int) -> Any:
    """Loads the bundle."""
    kind = OurVision if contender.part == "vision" else OurDecoder
    return kind(folder / contender.options["bundle"], threads)


def versions() -> dict[str, str]:
    """Returns the version of ONNX Runtime."""
    return {"onnxruntime": onnxruntime.__version__}
