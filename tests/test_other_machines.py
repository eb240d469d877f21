"""Behaviour that depends on the machine, tried as on machines that this one is not: with
and without bf16, VNNI, a GPU, and with few or many cores.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer

import runtime.engines
import runtime.engines.onnxruntime.sessions as sessions
import trainer.processes as processes
from export.planning import devices
from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.trainer.tiny_training import tiny_model
from trainer.config import StageRun
from trainer.datasets.scene_text import SceneSource
from trainer.train import TrainOptions, train


@pytest.mark.parametrize("fast", [True, False])
def test_auto_trains_in_bf16_exactly_where_the_hardware_has_it(
    fast: bool, tokenizer_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 has 8 bits of mantissa, so the losses agree to 2 %; fp32 repeats to the bit."""
    monkeypatch.setattr(processes, "fast_bf16", lambda: fast)
    assert processes.make_accelerator("auto").mixed_precision == ("bf16" if fast else "no")
    tokenizer, losses = Tokenizer(RawTokenizer.from_str(tokenizer_json), TINY), {}
    for precision in ("auto", "fp32"):
        options = TrainOptions(tmp_path / precision, workers=0, precision=precision)
        recipe = (StageRun("joint", 10, 2, 3e-3, warmup=1),)
        train(tiny_model(), tokenizer, SceneSource(), recipe, options)
        losses[precision] = json.loads((tmp_path / precision / "log.jsonl").read_text())["answer"]
    if fast:
        assert losses["auto"] != losses["fp32"]
        assert losses["auto"] == pytest.approx(losses["fp32"], rel=0.02)
    else:
        assert losses["auto"] == losses["fp32"]


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("gpu_bf16", [True, False])
@pytest.mark.parametrize("cpu_bf16", [True, False])
def test_fast_bf16_asks_the_gpu_if_there_is_one_else_the_cpu(
    cuda: bool, gpu_bf16: bool, cpu_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert processes.fast_bf16() == (gpu_bf16 if cuda else cpu_bf16)


@pytest.mark.parametrize("vnni", [True, False])
def test_a_plan_counts_on_fast_8_bit_products_only_with_vnni(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has", lambda *features: vnni and "avx512_vnni" in features)
    here = devices.this_machine()
    assert here.int8_tops / here.float_tflops == pytest.approx(4.0 if vnni else 1.3)


@pytest.mark.parametrize("cores", [1, 64])
def test_engines_use_the_cores_there_are_unless_told_otherwise(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "available_cores", lambda: cores)
    assert sessions.session_options(None).intra_op_num_threads == cores
    assert sessions.session_options(3).intra_op_num_threads == 3


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert runtime.engines.available_cores() == 3
