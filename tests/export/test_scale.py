"""A 300-million-parameter shape builds in what the compiler itself takes and a part of
its float weights: nothing holds the whole model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.planning.devices import DEVICES
from export.planning.plan import make_plan
from export.schemes import choose_scheme
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec
from trainer.checkpoint import write_random

SHAPE = ModelSpec(
    name="300m",
    vision=VisionSpec(
        image_size=224, patch_size=14, width=768, layers=12, heads=12, mlp_width=3072
    ),
    decoder=DecoderSpec(
        vocab_size=8000, hidden=1024, layers=18, heads=16, kv_heads=4, mlp_width=2816, context=512
    ),
    pool_sizes=(8, 4),
)
MIB = 1 << 20
pytestmark = pytest.mark.slow


PEAK = """
import atexit, sys
from runtime.output.console import peak_memory_mib
from {module} import main
atexit.register(lambda: print(peak_memory_mib(), file=sys.stderr))
main()
"""


def measured(module: str, *arguments: str) -> tuple[dict[str, Any], float]:
    """The JSON object a command prints, and the peak memory of its process in MiB."""
    command = [sys.executable, "-c", PEAK.format(module=module), *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), float(result.stderr.split()[-1])


def test_a_model_is_built_and_run_in_a_part_of_its_float_weights(
    tmp_path: Path, tokenizer_json: str, scene_png: Path
) -> None:
    assert 280e6 < SHAPE.parameters < 320e6
    write_random(tmp_path / "ckpt", SHAPE, tokenizer_json)
    options = [
        "--precision",
        "int4",
        "--rounding",
        "mse",
        "--samples",
        "4",
        "--questions",
        "0",
        "--json",
        "-o",
        str(tmp_path / "b"),
    ]
    built, peak = measured("export.cli", "build", str(tmp_path / "ckpt"), *options)
    assert built["verdict"] == "VERIFIED"
    plan = make_plan(SHAPE, choose_scheme("int4", rounding="mse"), DEVICES["rtx4090"], samples=4)
    assert built["bytes"] == pytest.approx(plan.disk_bytes, rel=0.15)
    floats = 4 * SHAPE.parameters / MIB
    assert peak < 450 + 0.7 * floats, (
        f"{peak:.0f} MiB; importing the compiler takes about 450, the float weights are "
        f"{floats:.0f}"
    )
    answer, peak = measured(
        "runtime.cli.run", str(scene_png), "describe", "--bundle", str(tmp_path / "b"), "--json"
    )
    assert answer["visual_tokens"] == 64 and answer["tokens"] and answer["verdict"] == "VERIFIED"
    assert peak < 0.6 * floats, f"{peak:.0f} MiB"
    print(
        f"build {built['peak_mib']} MiB (plan {plan.build_peak / MIB:.0f}), run {peak:.0f} MiB "
        f"(plan {plan.run_bytes / MIB:.0f})"
    )
