"""The canonical graphs in TensorRT's own parser, so that the design stays honest. Skipped where the compile-only TensorRT is absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from export.capture import capture
from export.passes import SIMPLIFY, run_passes
from export.pipeline import _quiet
from runtime.contract.spec import INPUTS_EMBEDS, PIXELS, POOL
from tests.conftest import TINY
from trainer.model import InfMLLM

ROOT = Path(__file__).parents[2]
SETUP = ROOT.parent / "shared" / "tools" / "tensorrt-aot" / "setup.sh"

PARSE = """
import sys, json
import tensorrt as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(sys.argv[1])
errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
names = [[network.get_input(i).name for i in range(network.num_inputs)], [network.get_output(i).name for i in range(network.num_outputs)]]
print(json.dumps({"parsed": parsed, "errors": errors, "names": names, "layers": network.num_layers}))
"""


@pytest.fixture(scope="module")
def tensorrt() -> dict[str, str]:
    """The environment in which `import tensorrt` works."""
    if not SETUP.exists():
        pytest.skip(f"{SETUP} is absent")
    folder = ROOT / ".tensorrt-aot"
    made = subprocess.run(["bash", str(SETUP), str(folder), sys.executable], capture_output=True, text=True, timeout=600)
    if made.returncode:
        pytest.skip(f"TensorRT could not be set up: {made.stderr.strip()[-200:]}")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_both_canonical_graphs_parse(tensorrt: dict[str, str], tmp_path: Path) -> None:
    import json

    with _quiet():
        model = InfMLLM(TINY, torch.Generator().manual_seed(1))
        graphs = capture(TINY, lambda name, weights=model: weights.get_parameter(name).detach())
        for model in vars(graphs).values():
            run_passes(model, SIMPLIFY)
    for name, model in vars(graphs).items():
        ir.save(model, tmp_path / f"{name}.onnx")
        result = subprocess.run([sys.executable, "-c", PARSE, str(tmp_path / f"{name}.onnx")], env=tensorrt, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout.strip().splitlines()[-1])
        assert report["parsed"] and not report["errors"], report
        assert report["names"][0][:2] == ([PIXELS, POOL] if name == "vision" else [INPUTS_EMBEDS, "position_ids"])
        assert report["layers"] > 20
