"""Several processes: data parallel and sharded training take the steps of one process
that accumulates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.trainer.sharded_run import RECIPE
from trainer.datasets.scene_text import SceneSource
from trainer.model import InfMLLM
from trainer.objective import Objective
from trainer.train import TrainOptions, train

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("answer", "dense")} for line in lines]


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one_that_accumulates_twice(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    common = [
        "--start-from",
        tiny_checkpoint,
        "--stage",
        "joint",
        "--steps",
        20,
        "--batch",
        2,
        "--val",
        "synthetic:1",
        "--precision",
        "fp32",
        "--threads",
        1,
    ]
    run(*TORCHRUN, "-m", "trainer.cli", *common, "--out", tmp_path / "two")
    run(sys.executable, "-m", "trainer.cli", *common, "--accumulate", 2, "--out", tmp_path / "one")
    two, one = curve(tmp_path / ".two.training"), curve(tmp_path / ".one.training")
    assert len(two) == len(one) == 2 and one[1]["answer"] < one[0]["answer"]
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
def test_sharded_training_equals_accumulation_and_resumes(
    tokenizer_json: str, tmp_path: Path
) -> None:
    single = InfMLLM(TINY, torch.Generator().manual_seed(0))
    recipe = tuple(replace(stage, accumulate=2) for stage in RECIPE)
    train(
        single,
        Tokenizer(RawTokenizer.from_str(tokenizer_json), TINY),
        SceneSource(),
        recipe,
        TrainOptions(tmp_path / "single", workers=0, precision="fp32"),
    )
    script = [*TORCHRUN, "-m", "tests.trainer.sharded_run"]
    run(*script, tmp_path / "whole", tmp_path / "whole.pt", 0, "new", "fp32")
    run(*script, tmp_path / "parts", tmp_path / "parts.pt", 6, "new", "fp32")
    run(*script, tmp_path / "parts", tmp_path / "parts.pt", 0, "resume", "fp32")
    run(*script, tmp_path / "half", tmp_path / "half.pt", 0, "new", "bf16")
    whole, parts, half = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("whole", "parts", "half")
    )
    start = InfMLLM(TINY, torch.Generator().manual_seed(0)).state_dict()
    for name, tensor in single.state_dict().items():
        moved = float(
            (tensor - start[name]).norm()
        )  # Adam turns rounding of tiny gradients into steps, so drift is measured against movement
        assert float((whole[name] - tensor).norm()) <= 0.05 * moved + 1e-6, name
        assert torch.equal(whole[name], parts[name]), name
        assert (
            half[name].dtype == torch.float32
            and float((half[name] - tensor).norm()) <= 0.7 * moved + 1e-6
        ), name


def test_launch_files_name_our_blocks() -> None:
    configs = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / "trainer" / "launch").glob("*.yaml")
    }
    assert set(configs) == {"ddp", "fsdp2"}
    sharding = configs["fsdp2"]["fsdp_config"]
    assert sharding["fsdp_version"] == 2
    assert (
        tuple(sharding["fsdp_transformer_layer_cls_to_wrap"].split(","))
        == Objective._no_split_modules
    )
    found = {type(module).__name__ for module in InfMLLM(TINY).modules()}
    assert set(Objective._no_split_modules) <= found
