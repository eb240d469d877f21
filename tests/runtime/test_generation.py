"""Decoding against independent references: `transformers.generate` token for token for
greedy and beams, its processors for sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import Decoding, Question, Session, load
from runtime.contract.errors import UsageError
from runtime.contract.prompt import render
from runtime.engines import Batch
from runtime.generation.prompt_lookup import PromptLookup
from runtime.generation.sampling import Sampler, distribution, scores
from runtime.generation.token_embeddings import embed_prompt
from tests.conftest import TINY
from tests.references import llama
from trainer.checkpoint import load_checkpoint

TOKENS = 30
RNG = np.random.default_rng(4)
PROMPTS = [
    ("caption", "describe"),
    ("vqa", "what is it?"),
    ("ground", "red circle"),
    ("chat", "Hello there, say it twice."),
]


@pytest.fixture(scope="module")
def session(built: Callable[[str], Path]) -> Session:
    return load(built("fp32"))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> LlamaForCausalLM:
    model = llama(TINY.decoder)
    weights = {
        f"model.{name}": value
        for name, value in load_checkpoint(tiny_checkpoint).model.decoder.state_dict().items()
    }
    weights["lm_head.weight"] = weights.pop("model.lm_head.weight")
    model.load_state_dict(weights)
    return model


def embeds_of(session: Session, image: Image.Image, task: str, text: str) -> torch.Tensor:
    before, after = session.tokenizer.encode_prompt(render(task, text))
    return torch.from_numpy(
        embed_prompt(
            session.table, before, session.builder.open_image(image).embedded.embeds, after
        )
    )


def generated(
    session: Session,
    model: LlamaForCausalLM,
    image: Image.Image,
    task: str,
    text: str,
    **settings: object,
) -> list[int]:
    spec = session.spec
    config = GenerationConfig(
        max_new_tokens=TOKENS,
        eos_token_id=spec.eos_id,
        pad_token_id=spec.pad_id,
        do_sample=False,
        **settings,
    )
    inputs = embeds_of(session, image, task, text)
    with torch.no_grad():
        found = model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2]),
            generation_config=config,
        )[0].tolist()
    return found[: found.index(spec.eos_id)] if spec.eos_id in found else found


@pytest.mark.parametrize(("task", "text"), PROMPTS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(
    session: Session,
    reference: LlamaForCausalLM,
    scene_image: Image.Image,
    task: str,
    text: str,
    penalty: float,
) -> None:
    expected = generated(session, reference, scene_image, task, text, repetition_penalty=penalty)
    answer = session.ask(
        scene_image, text, task, None, TOKENS, Decoding(repetition_penalty=penalty, constrain=False)
    )
    assert list(answer.tokens) == expected and len(expected) > 3


@pytest.mark.parametrize(("task", "text"), PROMPTS)
@pytest.mark.parametrize(
    ("beams", "length_penalty", "shortest"), [(5, 1.0, 8), (5, 0.0, 1), (3, 2.0, 0), (2, -1.0, 3)]
)
def test_beams_are_those_of_transformers(
    session: Session,
    reference: LlamaForCausalLM,
    scene_image: Image.Image,
    task: str,
    text: str,
    beams: int,
    length_penalty: float,
    shortest: int,
) -> None:
    expected = generated(
        session,
        reference,
        scene_image,
        task,
        text,
        num_beams=beams,
        length_penalty=length_penalty,
        min_new_tokens=shortest,
    )
    decoding = Decoding(
        beams=beams, length_penalty=length_penalty, min_new_tokens=shortest, constrain=False
    )
    assert list(session.ask(scene_image, text, task, None, TOKENS, decoding).tokens) == expected


def test_beams_that_end_are_those_of_transformers(
    session: Session, reference: LlamaForCausalLM, scene_image: Image.Image
) -> None:
    """Random weights hardly ever end by themselves; a head that likes the end makes
    ended and open beams compete.
    """
    import copy

    liking = copy.deepcopy(reference)
    eos = session.spec.eos_id
    forward, batch = session.engine.forward, session.engine.batch
    boost = 2.5
    liking.lm_head.register_forward_hook(
        lambda module, inputs, output: output + boost * torch.eye(output.shape[-1])[eos]
    )

    def liked(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[..., eos] += boost
        return logits

    class Liking:
        def __init__(self, inner: Batch) -> None:
            self.fill, self.copy, self._step = inner.fill, inner.copy, inner.step

        def step(self, inputs_embeds: np.ndarray, starts: np.ndarray) -> np.ndarray:
            return liked(self._step(inputs_embeds, starts))

    session.engine.forward = lambda inputs_embeds, start: liked(forward(inputs_embeds, start))
    session.engine.batch = lambda slots, rows: Liking(batch(slots, rows))
    lengths = set()
    try:
        for task, text in PROMPTS:
            for length_penalty in (0.0, 1.0, 3.0):
                expected = generated(
                    session,
                    liking,
                    scene_image,
                    task,
                    text,
                    num_beams=4,
                    length_penalty=length_penalty,
                )
                decoding = Decoding(beams=4, length_penalty=length_penalty, constrain=False)
                answer = session.ask(scene_image, text, task, None, TOKENS, decoding)
                assert list(answer.tokens) == expected, (task, length_penalty)
                lengths.add(len(expected))
    finally:
        session.engine.forward, session.engine.batch = forward, batch
        session.runner.prefix_cache.clear()
    assert len(lengths) > 2, "some end early, some late"


def test_published_settings() -> None:
    caption, vqa = Decoding.published("caption"), Decoding.published("vqa", stop=("x",))
    assert (caption.beams, caption.min_new_tokens, caption.length_penalty) == (5, 8, 1.0)
    assert (vqa.beams, vqa.length_penalty, vqa.stop) == (5, 0.0, ("x",)) and Decoding.published(
        "chat"
    ).beams == 1


@pytest.mark.parametrize(
    ("decoding", "processors"),
    [
        (Decoding(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Decoding(temperature=1.3, top_k=7), [TemperatureLogitsWarper(1.3), TopKLogitsWarper(7)]),
        (Decoding(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
        (
            Decoding(temperature=0.9, min_p=0.05),
            [TemperatureLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
        (
            Decoding(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
            [
                RepetitionPenaltyLogitsProcessor(1.4),
                TemperatureLogitsWarper(0.8),
                TopKLogitsWarper(40),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.02),
            ],
        ),
    ],
    ids=("temperature", "top-k", "top-p", "min-p", "all"),
)
def test_probabilities_are_those_of_transformers(
    decoding: Decoding, processors: list[object]
) -> None:
    generated = [3, 17, 3]
    for _ in range(20):
        logits = RNG.normal(size=200).astype(np.float32) * 3
        found = distribution(scores(logits, decoding, generated, eos_id=2), decoding)
        expected = (
            LogitsProcessorList(processors)(
                torch.LongTensor([generated]), torch.from_numpy(logits)[None].clone()
            )
            .softmax(-1)[0]
            .numpy()
        )
        assert np.allclose(found, expected, atol=1e-6) and np.array_equal(found > 0, expected > 0)


def test_draws_follow_the_distribution() -> None:
    """A chi-squared test: 4000 seeded draws against the probabilities they should have."""
    logits = RNG.normal(size=12).astype(np.float32)
    decoding = Decoding(temperature=0.8, top_k=8, seed=11)
    chooser = Sampler(decoding, eos_id=11)
    counts = np.bincount([chooser(logits) for _ in range(4000)], minlength=12)
    expected = 4000 * distribution(logits, decoding)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_squared < 24.3, "7 degrees of freedom, one in a thousand"


def test_seeds_repeat_and_differ(session: Session, scene_image: Image.Image) -> None:
    def sampled(seed: int | None) -> tuple[int, ...]:
        return session.ask(
            scene_image, "describe", decoding=Decoding(temperature=1.0, seed=seed)
        ).tokens

    assert sampled(1) == sampled(1) != sampled(2)
    assert len({sampled(None) for _ in range(3)}) == 3


def test_the_shortest_answer_holds_off_the_end(session: Session, scene_image: Image.Image) -> None:
    eos, logits = session.spec.eos_id, np.zeros(960, np.float32)
    logits[eos], logits[7] = 9, 5
    chooser = Sampler(Decoding(min_new_tokens=3), eos)
    assert [chooser(logits) for _ in range(4)] == [7, 7, 7, eos]


@pytest.mark.parametrize("visual_tokens", [16, 4])
@pytest.mark.parametrize(("task", "text"), PROMPTS)
def test_lookup_gives_the_same_tokens(
    session: Session, scene_image: Image.Image, task: str, text: str, visual_tokens: int
) -> None:
    plain = session.ask(
        scene_image, text, task, visual_tokens, 45, Decoding(lookup=0, constrain=False)
    )
    for drafted in (1, 4, 9):
        answer = session.ask(
            scene_image, text, task, visual_tokens, 45, Decoding(lookup=drafted, constrain=False)
        )
        assert answer.tokens == plain.tokens and answer.finish_reason == plain.finish_reason
        assert len(answer.step_ms) == 44 - answer.accepted_tokens
    sampled = (
        Decoding(lookup=0, temperature=0.7, seed=5),
        Decoding(lookup=4, temperature=0.7, seed=5),
    )
    one, two = (
        session.ask(scene_image, text, task, visual_tokens, 45, decoding) for decoding in sampled
    )
    assert one.tokens == two.tokens


def test_lookup_takes_what_repeats(
    session: Session, scene_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that always says the same four tokens in turn is drafted rightly."""
    monkeypatch.setattr(
        "runtime.generation.generate._DraftTimer.pays", lambda self: True
    )  # no timing decides here
    forward, verify = session.engine.forward, session.engine.verify
    cycle = {284: 280, 280: 335, 335: 304, 304: 284}
    table = session.table

    def follow(embeds: np.ndarray) -> np.ndarray:
        logits = np.zeros((embeds.shape[1], 960), np.float32)
        for row, embedding in enumerate(np.asarray(embeds[0], np.float32)):
            token = next((t for t in cycle if np.array_equal(table[t], embedding)), 304)
            logits[row, cycle[token]] = 1
        return logits

    session.engine.forward = lambda inputs_embeds, start: follow(inputs_embeds)[-1]
    session.engine.verify = lambda inputs_embeds, start: follow(inputs_embeds)
    try:
        plain = session.ask(scene_image, "describe", max_new_tokens=40, decoding=Decoding(lookup=0))
        answer = session.ask(
            scene_image, "describe", max_new_tokens=40, decoding=Decoding(lookup=4)
        )
    finally:
        session.engine.forward, session.engine.verify = forward, verify
        session.runner.prefix_cache.clear()
    assert (
        answer.tokens == plain.tokens and answer.accepted_tokens > 20 and len(answer.step_ms) < 20
    )


def test_lookup_drafts_what_followed() -> None:
    seen = PromptLookup([1, 2, 3, 4, 1, 2])
    assert seen.draft(2) == [3, 4] and seen.draft(9) == [3, 4, 1, 2]
    assert PromptLookup([1, 2, 3]).draft(4) == [] and PromptLookup([5]).draft(4) == []


def test_lookup_is_refused_where_it_could_change_a_token(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    quantised = load(built("int8"))
    with pytest.raises(UsageError, match="int8-weights"):
        quantised.ask(scene_image, "describe", decoding=Decoding(lookup=4))
    assert quantised.ask(scene_image, "describe").drafted_tokens == 0


def test_many_questions_are_answered_as_one_by_one(
    session: Session, scene_image: Image.Image
) -> None:
    other = scene_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    questions = [
        Question(image, text, task, tokens, 5 + 7 * i)
        for i, (task, text) in enumerate(PROMPTS)
        for image in (scene_image, other)
        for tokens in (16, 4)
    ]
    alone = [
        session.ask(q.image, q.text, q.task, q.visual_tokens, q.max_new_tokens) for q in questions
    ]
    together = session.ask_many(questions)
    assert len(questions) > 8, "more than one wave"
    for one, many in zip(alone, together, strict=True):
        assert (one.tokens, one.text, one.finish_reason, one.boxes) == (
            many.tokens,
            many.text,
            many.finish_reason,
            many.boxes,
        )
    sampled = Decoding(temperature=1.0, seed=3)
    assert [a.tokens for a in session.ask_many(questions[:3], sampled)] == [
        session.ask(q.image, q.text, q.task, q.visual_tokens, q.max_new_tokens, sampled).tokens
        for q in questions[:3]
    ]
    beams = Decoding(beams=2)
    assert (
        session.ask_many(questions[:1], beams)[0].tokens
        == session.ask(
            questions[0].image,
            questions[0].text,
            questions[0].task,
            questions[0].visual_tokens,
            questions[0].max_new_tokens,
            beams,
        ).tokens
    )
    assert session.ask_many([]) == []
    with pytest.raises(UsageError, match="one question at a time"):
        session.ask_many(questions[:2], Decoding(lookup=4))
