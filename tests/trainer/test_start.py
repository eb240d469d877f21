"""Starting from a checkpoint: another image size, more words, and what a user can
combine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.errors import SpecError, UsageError
from runtime.contract.image import to_pixels
from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from trainer.checkpoint import load_checkpoint
from trainer.datasets.scene_text import scene_samples
from trainer.datasets.scenes import draw_scene
from trainer.model import InfMLLM
from trainer.start import extended, new_start, resized, start_from_checkpoint

TEXTS = ["a blood smear with platelets"] * 3


@torch.no_grad()
def test_new_words_leave_what_was_known_as_it_was(tiny_checkpoint: Path) -> None:
    before, after = (
        load_checkpoint(tiny_checkpoint),
        start_from_checkpoint(tiny_checkpoint, new_words=TEXTS),
    )
    words = " a blood smear with platelets"
    assert len(after.tokenizer.encode(words)) == 5 < len(before.tokenizer.encode(words))
    rng = np.random.default_rng(0)
    scene = draw_scene(rng, 3)
    pixels = torch.from_numpy(to_pixels(scene.image, TINY))
    old_embeds, new_embeds = (
        before.model.embed_image(pixels, 2)[0],
        after.model.embed_image(pixels, 2)[0],
    )
    for sample in scene_samples(scene, rng):
        parts = [(t.encode_prompt(sample.prompt())) for t in (before.tokenizer, after.tokenizer)]
        texts = [
            [t.decode([i]) for i in ids]
            for t, (_, ids) in zip((before.tokenizer, after.tokenizer), parts, strict=True)
        ]
        assert texts[0] == texts[1]
        old = before.model.logits(before.model.sequence(parts[0][0], old_embeds, parts[0][1]))[
            0, -1
        ]
        new = after.model.logits(after.model.sequence(parts[1][0], new_embeds, parts[1][1]))[0, -1]
        known = {before.tokenizer.decode([i]): i for i in range(before.tokenizer.vocab_size)}
        texts_after = {after.tokenizer.decode([i]): i for i in range(after.tokenizer.vocab_size)}
        pairs = [
            (known[text], i)
            for text, i in texts_after.items()
            if text in known and text and "\ufffd" not in text
        ]
        assert len(pairs) > 400
        ids = torch.tensor(pairs)
        assert torch.allclose(old[ids[:, 0]], new[ids[:, 1]], atol=1e-5)


@torch.no_grad()
def test_a_new_token_starts_as_the_mean_of_its_spelling(tokenizer_json: str) -> None:
    model, old = (
        InfMLLM(TINY, torch.Generator().manual_seed(0)),
        RawTokenizer.from_str(tokenizer_json),
    )
    grown, text = extended(model, old, TEXTS)
    new = Tokenizer(RawTokenizer.from_str(text), grown.spec)
    [token] = new.encode(" platelets")
    spelt = old.encode(" platelets", add_special_tokens=False).ids
    assert len(spelt) > 1 and grown.spec.decoder.vocab_size % 64 == 0
    assert torch.allclose(
        grown.decoder.embed_tokens.weight[token], model.decoder.embed_tokens.weight[spelt].mean(0)
    )


def test_many_new_words_leave_coordinates_whole() -> None:
    inner = RawTokenizer.from_str(new_start(TINY, 0).tokenizer_json)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"qu{a}{b}{c}zle" for a in letters for b in letters for c in letters[:4]] * 3
    grown, text = extended(InfMLLM(TINY), inner, texts)
    tokenizer = Tokenizer(RawTokenizer.from_str(text), grown.spec)
    for hundredths in range(101):
        for prefix in ("", " ", ","):
            assert len(tokenizer.encode(f"{prefix}{hundredths / 100:.2f}")) == 1
    assert len(tokenizer.encode(" quabazle")) == 1


def test_foreign_tokenizers_do_not_grow() -> None:
    from tokenizers import models

    with pytest.raises(UsageError, match="--new-words"):
        extended(InfMLLM(TINY), RawTokenizer(models.BPE()), TEXTS)


@torch.no_grad()
def test_another_picture_size() -> None:
    model = new_start(TINY, 0).model
    larger = resized(model, 3 * TINY.vision.image_size // 2)
    grid = larger.spec.vision.grid
    assert (
        larger.spec.pool_sizes == (grid, grid // 2)
        and larger.vision_tower.pos_embed.shape[1] == grid**2 + 1
    )
    image = torch.randn(1, 3, larger.spec.vision.image_size, larger.spec.vision.image_size)
    assert larger.embed_image(image, grid).shape == (1, grid**2, TINY.decoder.hidden)
    with pytest.raises(SpecError, match="multiple"):
        resized(model, TINY.vision.image_size + 1)
