"""Training: packing is single-turn training, stages train what their table says, a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.errors import CheckpointError, DataError, NonFiniteError, UsageError
from runtime.contract.image import to_pixels
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Sample
from tests.conftest import TINY
from trainer.batch import IGNORE, Batch, block_mask, collate, pack
from trainer.config import PRESETS, STAGES, StageRun, find_preset, find_recipe
from trainer.datasets import open_source
from trainer.datasets.held_out import held_out_scenes
from trainer.datasets.scene_text import SceneSource, chat_samples, scene_samples
from trainer.datasets.scenes import draw_scene
from trainer.datasets.source import BatchStream
from trainer.loss import AnswerLoss
from trainer.model import InfMLLM
from trainer.objective import Objective, make_optimiser
from trainer.processes import fast_bf16, make_accelerator
from trainer.schedule import learning_rate
from trainer.train import TrainOptions, train


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer(RawTokenizer.from_str(tokenizer_json), TINY)


def tiny_model(seed: int = 0) -> InfMLLM:
    return InfMLLM(TINY, torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("chat", [False, True])
def test_a_packed_row_gives_each_pair_its_single_turn_logits(
    tokenizer: Tokenizer, chat: bool
) -> None:
    rng, model = np.random.default_rng(1), tiny_model().eval()
    scene = draw_scene(rng, 3)
    samples = chat_samples(scene, rng) if chat else scene_samples(scene, rng)
    row, pixels = pack(samples, tokenizer, 4, 512), to_pixels(scene.image, TINY)
    batch = collate(
        [row, pack(samples[:1], tokenizer, 4, 512)], [pixels, pixels], 2
    )  # a shorter second row, for padding
    embeds = model.embed_image(batch.pixels, 2)
    inputs = model.decoder.embed_tokens(batch.ids.clamp_min(0)).masked_scatter(
        batch.image_slots[..., None], embeds
    )
    hidden, _ = model.decoder(inputs, batch.positions, block_mask(batch.segments))
    packed = model.decoder.lm_head(hidden)[0]
    assert int((batch.labels[0] != IGNORE).sum()) == sum(
        len(tokenizer.encode((" " if s.task != "ground" else "") + s.answer)) + 1 for s in samples
    )
    for index, sample in enumerate(samples, 1):
        before, after = tokenizer.encode_prompt(sample.prompt())
        inside = batch.segments[0] == index
        fed = batch.ids[0][inside].tolist()
        assert fed[: len(after)] == after
        alone = model.logits(model.sequence(before, embeds[0], fed))[0, -len(fed) :]
        assert torch.allclose(packed[inside], alone, atol=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_exactly_what_its_table_says(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(
        model,
        tokenizer,
        SceneSource(),
        (StageRun(name, 2, 4, 1e-2, warmup=1),),
        TrainOptions(tmp_path, workers=0, precision="fp32"),
    )
    changed = {
        key.split(".")[0] if "self_attn" not in key else key
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    parts = {part for part in changed if "." not in part}
    attention = {key.split(".")[-2] for key in changed if "self_attn" in key}
    expected = {
        "dense": ({"vision_tower"}, set()),
        "scratch": ({"pool_adapter", "decoder"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        "joint": (
            {"vision_tower", "pool_adapter", "decoder"},
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        "alignment": ({"pool_adapter"}, set()),
        "multitask": ({"vision_tower", "pool_adapter"}, {"q_proj", "v_proj"}),
        "instruction": ({"pool_adapter", "decoder"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    }
    assert (parts, attention) == expected[name]


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    recipe = (
        StageRun("dense", 3, 4, 1e-3, warmup=1),
        StageRun("joint", 4, 4, 1e-3, warmup=1, chat_share=0.5),
    )
    whole = tiny_model()
    train(
        whole,
        tokenizer,
        SceneSource(),
        recipe,
        TrainOptions(tmp_path / "whole", workers=0, precision="fp32"),
    )
    for stop in (2, 3, 5):
        model = tiny_model()
        folder = tmp_path / f"parts{stop}"
        train(
            model,
            tokenizer,
            SceneSource(),
            recipe,
            TrainOptions(folder, stop_after=stop, workers=0, precision="fp32"),
        )
        model = tiny_model(99)
        train(
            model,
            tokenizer,
            SceneSource(),
            recipe,
            TrainOptions(folder, resume=True, workers=0, precision="fp32"),
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
        ), stop


def test_resuming_with_another_recipe_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train(
        tiny_model(),
        tokenizer,
        SceneSource(),
        (StageRun("dense", 1, 2, 1e-3),),
        TrainOptions(tmp_path, workers=0, precision="fp32"),
    )
    for options, steps in (
        (TrainOptions(tmp_path, resume=True, workers=0, precision="fp32"), 2),
        (TrainOptions(tmp_path, seed=1, resume=True, workers=0, precision="fp32"), 1),
    ):
        with pytest.raises(CheckpointError, match="another run"):
            train(
                tiny_model(),
                tokenizer,
                SceneSource(),
                (StageRun("dense", steps, 2, 1e-3),),
                options,
            )
    (tmp_path / "state.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(
            tiny_model(),
            tokenizer,
            SceneSource(),
            (StageRun("dense", 1, 2, 1e-3),),
            TrainOptions(tmp_path, resume=True, workers=0, precision="fp32"),
        )


def test_an_overlong_sample_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="context has 128"):
        pack([Sample("caption", "describe", "word " * 200)], tokenizer, 4, 128)


def test_training_lowers_the_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train(
        tiny_model(),
        tokenizer,
        SceneSource(),
        (StageRun("scratch", 60, 8, 3e-3, warmup=10),),
        TrainOptions(tmp_path, workers=0, precision="fp32"),
    )
    losses = [
        json.loads(line)["answer"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_learning_rate_warms_up_and_ends_on_the_floor() -> None:
    run = StageRun("joint", 100, 8, 1.0, warmup=10, floor=0.1)
    rates = [learning_rate(run, step) for step in range(101)]
    assert (
        rates[0] == pytest.approx(0.1)
        and max(rates) == pytest.approx(1.0)
        and rates[100] == pytest.approx(0.1)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_linear_schedule_falls_in_a_line() -> None:
    run = StageRun("joint", 110, 8, 1.0, warmup=10, floor=0.2, decay="linear")
    assert [learning_rate(run, step) for step in (10, 60, 110)] == pytest.approx([1.0, 0.6, 0.2])


def test_accumulating_equals_one_larger_batch_in_the_loss(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One step of two micro-batches has the mean gradient of the two, so the weights
    move as after averaging by hand.
    """
    models = [tiny_model(), tiny_model()]
    train(
        models[0],
        tokenizer,
        SceneSource(),
        (StageRun("scratch", 1, 2, 1e-2, warmup=1, accumulate=2),),
        TrainOptions(tmp_path / "a", workers=0, precision="fp32"),
    )
    stage, objective = (
        STAGES["scratch"],
        Objective(models[1], tokenizer, SceneSource.dense_classes, 0),
    )
    optimiser = make_optimiser(objective, StageRun("scratch", 1, 2, 1e-2, warmup=1))
    stream = BatchStream(SceneSource(), TINY, tokenizer, 2, 0, 0.0, 2)
    for index in range(2):
        batch = stream[index]
        assert isinstance(batch, Batch)
        (objective(batch, stage)[0] / 2).backward()
    trained = [p for p in objective.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    for (name, a), b in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6), name


def test_recomputing_activations_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    models = [tiny_model(), tiny_model()]
    for model, recompute in zip(models, (False, True), strict=True):
        options = TrainOptions(
            tmp_path / str(recompute), workers=0, recompute=recompute, precision="fp32"
        )
        train(model, tokenizer, SceneSource(), (StageRun("joint", 3, 2, 1e-2, warmup=1),), options)
        assert not model.decoder.recompute
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(
            models[0].state_dict().values(), models[1].state_dict().values(), strict=True
        )
    )


def test_bf16_trains_close_to_fp32_and_auto_asks_the_hardware(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
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
    assert make_accelerator("auto").mixed_precision == ("bf16" if fast_bf16() else "no")
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
