"""Checkpoints are read strictly and written all or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from runtime.contract.errors import CheckpointError
from tests.conftest import TINY
from trainer.checkpoint import CARD, CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from trainer.model import InfMLLM


def test_weights_that_overflow_are_not_saved_over_a_good_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "ck"))
    before = (path / WEIGHTS).read_bytes()
    model = InfMLLM(TINY, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.decoder.lm_head.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(path, model, "{}", {})
    assert (path / WEIGHTS).read_bytes() == before


def damage(path: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / WEIGHTS)
    name = sorted(weights)[0]
    if how == "missing":
        del weights[name]
    elif how == "unknown":
        weights["extra"] = torch.zeros(1)
    elif how == "shape":
        weights[name] = torch.zeros(3)
    elif how == "nan":
        weights[name][...] = float("nan")
    save_file(weights, path / WEIGHTS)


@pytest.mark.parametrize(
    "how", ["card", "missing", "unknown", "shape", "nan", "truncated", "none", "config", "pickle"]
)
def test_checkpoints_are_read_strictly(how: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "ck"))
    assert load_checkpoint(path).card == json.loads((path / CARD).read_text())
    if how == "truncated":
        (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-7])
    elif how == "card":
        (path / CARD).write_bytes(b"\xff{")
    elif how == "none":
        shutil.rmtree(path)
    elif how == "config":
        (path / CONFIG).write_text('{"name": "x"}')
    elif how == "pickle":
        torch.save({}, path / "pytorch_model.bin")
        (path / WEIGHTS).unlink()
    else:
        damage(path, how)
    with pytest.raises(Exception) as caught:
        load_checkpoint(path)
    assert type(caught.value).__name__ in ("CheckpointError", "SpecError") and "\n" not in str(
        caught.value
    )
