"""onnxruntime-genai: the decoder, built with its own model builder and run with its
generator. It uses weight-only kernels (MatMulNBits) with 4 or 8 bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from contenders import CONTEXT, Contender, file_bytes
from contenders.weights import llama_folder, spec_of, write_checkpoint

__all__ = ["GenaiDecoder", "load", "prepare", "versions"]

_CONFIG = "genai_config.json"
Array = NDArray[np.float32]


class GenaiDecoder:
    """See `contenders.Decoder`."""

    def __init__(self, place: Path, threads: int, table_bytes: int) -> None:
        config = og.Config(str(place))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self.disk_bytes = file_bytes(place)
        self.weight_bytes = sum(file_bytes(file) for file in place.glob("*.onnx*")) - table_bytes
        self.reset()

    def reset(self) -> None:
        """See `contenders.Decoder`."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=CONTEXT, do_sample=False)
        self._generator = og.Generator(self._model, parameters)

    def prefill(self, tokens: list[int]) -> Array:
        """See `contenders.Decoder`."""
        self._generator.append_tokens(np.array([tokens], np.int32))
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1)

    def step(self, token: int) -> Array:
        """See `contenders.Decoder`."""
        return self.prefill([token])


def prepare(folder: Path, contender: Contender) -> None:
    """Builds the model unless it exists."""
    write_checkpoint(folder)
    place = _place(folder, contender)
    if (place / _CONFIG).exists():
        return
    options = [
        f"block_size={contender.options['block']}",
        "accuracy_level=4",
        "hf_token=false",
        "prune_lm_head=true",
    ]
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(llama_folder(folder)),
        "-o",
        str(place),
    ]
    command += [
        "-p",
        contender.options["precision"],
        "-e",
        "cpu",
        "-c",
        str(folder / "genai-cache"),
        "--extra_options",
        *options,
    ]
    subprocess.run(command, check=True)


def _place(folder: Path, contender: Contender) -> Path:
    return folder / contender.name.replace(" ", "-").lower()


def load(folder: Path, contender: Contender, threads: int) -> Any:
    """Loads the built model."""
    spec = spec_of(folder).decoder
    return GenaiDecoder(_place(folder, contender), threads, 4 * spec.vocab_size * spec.hidden)


def versions() -> dict[str, str]:
    """Returns the version of onnxruntime-genai."""
    return {"onnxruntime-genai": og.__version__}
