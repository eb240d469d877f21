"""Compares the quantisation schemes of this project with those of onnxruntime. It
quantises the same float graphs with onnxruntime's tools and writes bundles to evaluate.

python benchmarks/quantisers.py fp32.bundle OUT_FOLDER
infmllm-eval OUT_FOLDER/ort-int8 synthetic:500

The bundles are marked UNVERIFIED, because they were not compared with PyTorch;
`infmllm-run --self-test --bundle …` prints their parity errors.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from export.manifest import write_manifest
from runtime.contract.bundle import DECODER, VISION, read_bundle


def int8_dynamic(source: Path, target: Path) -> None:
    """Quantises dynamically with onnxruntime: 8-bit weights per channel, activations
    per tensor from their values at run time.
    """
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def int4_nearest(source: Path, target: Path) -> None:
    """Quantises to 4-bit weights with onnxruntime: blocks of 32, rounded to nearest,
    with zero points.
    """
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def int4_hqq(source: Path, target: Path) -> None:
    """Quantises to 4-bit weights with onnxruntime's HQQ: blocks of 32, with zero points
    optimised without data.
    """
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), algo_config=HQQWeightOnlyQuantConfig(block_size=32)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


TOOLS = {"ort-int8": int8_dynamic, "ort-int4": int4_nearest, "ort-int4-hqq": int4_hqq}


def main() -> None:
    """Writes one bundle per tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    bundle = read_bundle(given.bundle)
    for name, tool in TOOLS.items():
        folder = given.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in bundle.files:
            if not file.startswith((VISION[:-5], DECODER[:-5])):
                shutil.copyfile(bundle.path / file, folder / file)
        try:
            for graph in (VISION, DECODER):
                tool(bundle.path / graph, folder / graph)
        except Exception as error:  # these tools raise exceptions of any type
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]:.200}")
            shutil.rmtree(folder)
            continue
        (folder / "manifest.json").unlink(missing_ok=True)
        parity = {"tolerance": {"vision": 1.0, "prefill": 1.0, "decode": 1.0}}
        write_manifest(
            folder,
            bundle.spec,
            bundle.target,
            {"vision": name, "decoder": name},
            {"made_by": "onnxruntime.quantization"},
            parity,
        )
        size = sum((folder / graph).stat().st_size for graph in (VISION, DECODER))
        print(f"{name}: {size / 1e6:.2f} MB of graphs")


if __name__ == "__main__":
    main()
