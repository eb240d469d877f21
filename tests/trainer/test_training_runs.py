"""Runs of training: precision, curves, faults, logs, recipes and presets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.contract.errors import DataError, NonFiniteError, UsageError
from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.trainer.tiny_training import tiny_model, tokenizer  # noqa: F401
from trainer.config import PRESETS, STAGES, StageRun, find_preset, find_recipe
from trainer.datasets import open_source
from trainer.datasets.held_out import held_out_scenes
from trainer.datasets.scene_text import SceneSource
from trainer.loss import AnswerLoss
from trainer.model import InfMLLM
from trainer.processes import make_accelerator
from trainer.train import TrainOptions, train


def test_bf16_trains_close_to_fp32(tokenizer: Tokenizer, tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        options = TrainOptions(tmp_path / precision, workers=0, precision=precision)
        train(
            tiny_model(),
            tokenizer,
            SceneSource(),
            (StageRun("joint", 10, 2, 3e-3, warmup=1),),
            options,
        )
        losses.append(json.loads((tmp_path / precision / "log.jsonl").read_text())["answer"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    with pytest.raises(UsageError, match="auto, bf16, fp32"):
        make_accelerator("fp8")


def test_curves_and_sample_sheets_are_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = TrainOptions(
        tmp_path, workers=0, sample_every=6, samples=list(held_out_scenes(2)), precision="fp32"
    )
    recipe = (StageRun("dense", 10, 2, 1e-3, warmup=1), StageRun("joint", 12, 2, 1e-3, warmup=1))
    train(tiny_model(), tokenizer, SceneSource(), recipe, options)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("dense", 10), ("joint", 10)]
    assert lines[1].keys() >= {
        "answer",
        "dense",
        "patch accuracy",
        "lr",
        "images/s",
        "waiting for data %",
    }
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("dense")] == [10, 20] and len(
        curves.Images("samples")
    ) >= 2
    sheets = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert sheets == ["dense-000006.png", "joint-000006.png", "joint-000012.png"]
    with Image.open(tmp_path / "samples" / sheets[0]) as sheet:
        assert len(set(sheet.convert("L").tobytes())) > 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_worker_keeps_its_one_line(
    workers: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "d.jsonl").write_text('{"image": "a.png", "task": "caption", "answer": "x"}')
    with pytest.raises(DataError) as caught:
        options = TrainOptions(tmp_path / "s", workers=workers, precision="fp32")
        train(
            tiny_model(),
            tokenizer,
            open_source([str(tmp_path / "d.jsonl")]),
            (StageRun("alignment", 1, 2, 1e-3),),
            options,
        )
    assert (
        "a.png" in str(caught.value)
        and "\n" not in str(caught.value)
        and "Traceback" not in str(caught.value)
    )


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        train(
            model,
            tokenizer,
            SceneSource(),
            (StageRun("scratch", 2, 2, 1e-2, warmup=1),),
            TrainOptions(tmp_path, workers=0, precision="fp32"),
        )
    assert not (tmp_path / "state.pt").exists()


def test_a_resumed_log_has_every_step_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = (StageRun("dense", 30, 2, 1e-3, warmup=1),)
    train(
        tiny_model(),
        tokenizer,
        SceneSource(),
        recipe,
        TrainOptions(tmp_path, workers=0, stop_after=20, precision="fp32"),
    )
    log = tmp_path / "log.jsonl"
    log.write_text(
        log.read_text() + json.dumps({"total_step": 25}) + "\n"
    )  # logged after the last saved state
    train(
        tiny_model(),
        tokenizer,
        SceneSource(),
        recipe,
        TrainOptions(tmp_path, workers=0, resume=True, precision="fp32"),
    )
    assert [json.loads(line)["total_step"] for line in log.read_text().splitlines()] == [10, 20, 30]


def test_recipes_are_found_by_name() -> None:
    assert [run.stage for run in find_recipe(find_preset("edge"), "scratch,instruction")] == [
        "scratch",
        "instruction",
    ]
    nano = find_preset("nano")
    assert find_recipe(nano, "all") == nano.recipe
    assert [run.stage for run in find_recipe(nano, "published")] == [
        "alignment",
        "multitask",
        "instruction",
    ]
    assert [run.stage for run in find_recipe(nano, "dense,instruction")] == ["dense", "instruction"]
    for preset, text in ((find_preset("7b"), "all"), (nano, "sleep")):
        with pytest.raises(UsageError, match="alignment"):
            find_recipe(preset, text)


def test_coordinates_near_the_truth_cost_less(tokenizer: Tokenizer) -> None:
    loss = AnswerLoss(tokenizer, TINY.decoder.vocab_size)

    def cost(guess: str, truth: str) -> float:
        logits = torch.zeros(1, TINY.decoder.vocab_size)
        logits[0, tokenizer.encode(guess)[0]] = 8.0
        labels = torch.tensor(tokenizer.encode(truth))
        return float(loss(logits, labels, torch.ones(len(labels))))

    assert (
        cost("0.50", "0.50")
        < cost("0.51", "0.50")
        < cost("0.60", "0.50")
        == pytest.approx(cost(",0.50", "0.50"))
    )
    assert cost(" red", " red") < 0.5 < cost(" blue", " red")


def test_jsonl_lines_about_one_picture_are_packed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "task": "vqa", "question": f"what is {i}?", "answer": str(i)}
        for i in range(3)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    example = open_source([str(tmp_path / "d.jsonl")]).draw(np.random.default_rng(0), False, TINY)
    assert len(example.load()[1]) == 3
    train(
        tiny_model(),
        tokenizer,
        open_source([str(tmp_path / "d.jsonl")]),
        (StageRun("alignment", 2, 2, 1e-3),),
        TrainOptions(tmp_path / "s", workers=0, precision="fp32"),
    )


def test_files_without_patch_labels_cannot_train_the_dense_stage(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text('{"image": "a.png", "task": "caption", "answer": "x"}')
    with pytest.raises(UsageError, match="labels per patch"):
        train(
            tiny_model(),
            tokenizer,
            open_source([str(tmp_path / "d.jsonl")]),
            (StageRun("dense", 1, 2, 1e-3),),
            TrainOptions(tmp_path / "s", precision="fp32"),
        )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name: str) -> None:
    preset = find_preset(name)
    assert preset.spec.name == name and all(run.stage in STAGES for run in preset.recipe)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in InfMLLM(preset.spec).parameters())
    low, high = {"nano": (3e6, 7e6), "edge": (1.2e9, 1.6e9), "7b": (7.5e9, 7.9e9)}[name]
    assert low < count < high
    with pytest.raises(UsageError, match="nano"):
        find_preset("mega")
