"""OpenVINO: the decoder, exported by optimum-intel, and the vision graph, converted
from PyTorch and quantised by nncf.

The decoder is stateful: keys and values live in the infer request. A slice before the
output head keeps only the last position, as OpenVINO GenAI does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from contenders import CHECKPOINT, Contender, file_bytes
from contenders.weights import image_inputs, llama_folder, write_checkpoint

__all__ = ["IntelDecoder", "IntelVision", "compiled", "load", "prepare", "versions"]

_DECODER, _VISION = "openvino_model.xml", "vision.xml"
_SAMPLES = 4  # calibration images for nncf
Array = NDArray[np.float32]


def compiled(model: ov.Model, threads: int, **more: Any) -> ov.CompiledModel:
    """Compiles the model for the CPU with the fastest settings found: one stream with
    all threads, and float32 between quantised layers.
    """
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    settings["ENABLE_CPU_PINNING"] = False
    return ov.Core().compile_model(model, "CPU", {**settings, **more})


class IntelDecoder:
    """See `contenders.Decoder`."""

    def __init__(self, place: Path, threads: int, settings: dict[str, Any]) -> None:
        model = ov.Core().read_model(place / _DECODER)
        keep_last_position(model)
        self._names = {name for port in model.inputs for name in port.get_names()}
        self._request = compiled(model, threads, **settings).create_infer_request()
        self._position = 0
        self.disk_bytes = file_bytes(place)
        self.weight_bytes = file_bytes(place / _DECODER.replace(".xml", ".bin")) - _table_bytes(
            model
        )

    def reset(self) -> None:
        """See `contenders.Decoder`."""
        self._request.reset_state()
        self._position = 0

    def prefill(self, tokens: list[int]) -> Array:
        """See `contenders.Decoder`."""
        end = self._position + len(tokens)
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
        }
        inputs |= {
            "position_ids": np.arange(self._position, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer(
            {name: value for name, value in inputs.items() if name in self._names},
            share_inputs=True,
        )
        self._position = end
        return np.asarray(self._request.get_output_tensor(0).data)[0, -1]

    def step(self, token: int) -> Array:
        """See `contenders.Decoder`."""
        return self.prefill([token])


class IntelVision:
    """See `contenders.Vision`."""

    def __init__(self, file: Path, threads: int) -> None:
        self._request = compiled(ov.Core().read_model(file), threads).create_infer_request()
        self.disk_bytes = file_bytes(file.with_suffix(".bin"))

    def embed(self, pixels: Array, pool: Array) -> Array:
        """See `contenders.Vision`."""
        self._request.infer([pixels, pool], share_inputs=True)
        return np.asarray(self._request.get_output_tensor(0).data)[0]


def keep_last_position(model: ov.Model) -> None:
    """Slices the hidden states [B, L, H] to the last position before the matrix product
    that computes the logits.
    """
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden, whole = node.input_value(0), np.iinfo(np.int64).max
    last = ops.slice(hidden, np.array([-1]), np.array([whole]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def _table_bytes(model: ov.Model) -> int:
    """Returns the bytes of the token table, of which a step reads one row. They are
    those of the constants that feed the first Gather by token.
    """
    gather = next(
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Gather" and len(node.input_value(0).get_partial_shape()) == 2
    )
    waiting, total = [gather.input_value(0).get_node()], 0
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Constant":
            total += node.get_byte_size()
        waiting += [value.get_node() for value in node.input_values()]
    return total


def prepare(folder: Path, contender: Contender) -> None:
    """Converts the decoder or the vision graph unless it exists."""
    write_checkpoint(folder)
    place = _place(folder, contender)
    if (place / (_VISION if contender.part == "vision" else _DECODER)).exists():
        return
    if contender.part == "vision":
        _convert_vision(folder, place, contender.options["precision"])
        return
    command = [
        sys.executable,
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "openvino",
        "--model",
        str(llama_folder(folder)),
    ]
    subprocess.run(
        [
            *command,
            "--task",
            "text-generation-with-past",
            *contender.options["weights"],
            str(place),
        ],
        check=True,
    )


def _convert_vision(folder: Path, place: Path, precision: str) -> None:
    import torch

    from contenders.eager import tower

    pixels, pool = image_inputs(folder)
    with torch.inference_mode():
        example = (torch.from_numpy(pixels), torch.from_numpy(pool))
        model = ov.convert_model(
            tower(folder / CHECKPOINT),
            example_input=example,
            input=[list(pixels.shape), list(pool.shape)],
        )
    if precision == "int8":
        import nncf

        rng = np.random.default_rng(2)
        samples = [
            (rng.normal(size=pixels.shape).astype(np.float32), pool) for _ in range(_SAMPLES)
        ]
        dataset = nncf.Dataset(samples, lambda sample: list(sample))
        model = nncf.quantize(
            model,
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=_SAMPLES,
        )
    ov.save_model(model, place / _VISION, compress_to_fp16=False)


def _place(folder: Path, contender: Contender) -> Path:
    return folder / contender.name.replace(" ", "-").lower()


def load(folder: Path, contender: Contender, threads: int) -> Any:
    """Loads and compiles the converted model."""
    place = _place(folder, contender)
    return (
        IntelVision(place / _VISION, threads)
        if contender.part == "vision"
        else IntelDecoder(place, threads, contender.options.get("settings", {}))
    )


def versions() -> dict[str, str]:
    """Returns the version of OpenVINO."""
    return {"openvino": ov.get_version()}
