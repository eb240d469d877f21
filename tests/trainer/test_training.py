"""Training: packing is single-turn training, stages train what their table says, a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.contract.errors import CheckpointError, DataError
from runtime.contract.image import to_pixels
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Sample
from tests.conftest import TINY
from tests.trainer.tiny_training import tiny_model, tokenizer  # noqa: F401
from trainer.batch import IGNORE, Batch, block_mask, collate, pack
from trainer.config import STAGES, StageRun
from trainer.datasets.scene_text import SceneSource, chat_samples, scene_samples
from trainer.datasets.scenes import draw_scene
from trainer.datasets.source import BatchStream
from trainer.objective import Objective, make_optimiser
from trainer.schedule import learning_rate
from trainer.train import TrainOptions, train


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
