"""Asks a session questions in every way that users do, and checks each answer's tokens
with PyTorch: a new question, the same image again, a draft, several questions side by
side, a conversation, a beam search.

PyTorch is given the same tokens one by one. Each must have been the most likely one, up
to a margin that rounding explains. So the runtime's loop is checked by another loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.parity.rounded_engine import RoundedEngine
from runtime.contract.image import to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.engines import Engine
from runtime.engines.logits import greedy
from runtime.generation.decoding import Decoding
from runtime.generation.generate import Generation, Limits, Progress, SingleDecoder, decode
from runtime.generation.prompt_lookup import PromptLookup
from runtime.generation.token_embeddings import embed_tokens
from runtime.parity import centred
from runtime.questions import Answer, Question
from runtime.session import Session

__all__ = ["AnswerFault", "check_answers"]

Array = NDArray[np.float32]
_TOKENS, _DRAFTS = 8, 3
_TEXTS = ("Hello.", "what is it? Say it twice, twice.")
_OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)


@dataclass(frozen=True)
class AnswerFault:
    """The way of asking, and what is wrong with the answer."""

    way: str
    problem: str

    def __str__(self) -> str:
        return f"{self.way}: {self.problem}"


class _Checker:
    """PyTorch beside a session. `allowed` is the largest share of a row's standard
    deviation by which a chosen token may fall behind the best.
    """

    def __init__(self, session: Session, reference: RoundedEngine, allowed: float) -> None:
        self.session, self.reference, self.allowed = session, reference, allowed
        spec = session.spec
        size = spec.vision.image_size
        x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
        waves = [np.sin(9 * x + 3 * y), np.cos(7 * y), np.sin(5 * x * y)]
        first = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
        self.pictures = [Image.fromarray(picture) for picture in (first, first[::-1, ::-1].copy())]
        self.p = min(spec.pool_sizes)

    def prefill(
        self, picture: int, texts: Sequence[Sequence[int]], engine: Engine | None = None
    ) -> Array:
        """Runs the image's segment and then each text, in PyTorch if no engine is given.
        Returns the last logits.
        """
        runs = engine or self.reference
        spec, table = self.session.spec, self.session.table
        pixels = to_pixels(self.pictures[picture], spec)
        embeds = self.session.engine.embed_image(pixels, pool_matrix(spec.vision.grid, self.p))[0]
        tokenizer = self.session.tokenizer
        before = embed_tokens(table, [tokenizer.bos_id, *tokenizer.encode(_OPENING)])
        rows = np.concatenate([before, embeds[None].astype(np.float32)], axis=1)
        logits, self.start = runs.forward(rows, 0), rows.shape[1]
        for ids in texts:
            logits = runs.forward(embed_tokens(table, list(ids)), self.start)
            self.start += len(ids)
        return logits

    def follow(self, logits: Array, answer: Answer, limit: int) -> str | None:
        """Returns what is wrong with a greedy answer, or None."""
        spec, table = self.session.spec, self.session.table
        for index, token in enumerate(answer.tokens):
            if problem := self._behind(logits, token):
                return f"token {index} is {problem}"
            logits = self.reference.forward(embed_tokens(table, [token]), self.start)
            self.start += 1
        if len(answer.tokens) < limit and (problem := self._behind(logits, spec.eos_id)):
            return f"it ends after {len(answer.tokens)} tokens; the end is {problem}"
        return None

    def _behind(self, logits: Array, token: int) -> str | None:
        spread = float(centred(logits).std())
        gap = float(logits.max() - logits[token])
        return None if gap <= self.allowed * spread else f"{gap / spread:.2g} deviations behind"

    def text(self, question: str) -> list[int]:
        return self.session.tokenizer.encode(f"\n{question} ASSISTANT:")


def check_answers(
    session: Session, reference: RoundedEngine, allowed: float, batches: bool
) -> Iterator[AnswerFault]:
    """Yields the ways of asking whose answer PyTorch would not give. `batches` tells whether
    the engine decodes several sequences side by side.
    """
    check = _Checker(session, reference, allowed)
    visual, plain = check.p**2, Decoding(lookup=0)

    def asked(way: str, answer: Answer, picture: int, text: str) -> Iterator[AnswerFault]:
        logits = check.prefill(picture, [check.text(text)])
        if problem := check.follow(logits, answer, _TOKENS):
            yield AnswerFault(way, problem)

    # The last two are about an image that was seen before, with other rows in the cache.
    for way, picture, text in (
        ("a question", 0, 0),
        ("a new image", 1, 0),
        ("another question", 1, 1),
        ("an image again", 0, 1),
    ):
        answer = session.ask(check.pictures[picture], _TEXTS[text], "chat", visual, _TOKENS, plain)
        yield from asked(way, answer, picture, _TEXTS[text])
    if session.engine.verifies:
        yield from _drafts(check, answer)
    if batches:
        questions = [
            Question(check.pictures[index], _TEXTS[index], "chat", visual, _TOKENS)
            for index in range(2)
        ]
        for index, answer in enumerate(session.ask_many(questions, plain)):
            yield from asked("several questions", answer, index, _TEXTS[index])
        yield from _beams(check, visual)
    yield from _conversation(check, visual, plain)


class _Planned(PromptLookup):
    """Drafts the tokens of a known answer, and every third one wrong."""

    def __init__(self, answer: Sequence[int], vocabulary: int) -> None:
        super().__init__()
        self._answer, self._vocabulary, self._at = list(answer), vocabulary, 0

    def add(self, token: int) -> None:
        """Counts the tokens that were taken."""
        self._at = getattr(self, "_at", 0) + 1

    def draft(self, limit: int) -> list[int]:
        """Returns the tokens that should follow, some of them wrong."""
        planned = self._answer[self._at : self._at + limit]
        return [
            (token + 1) % self._vocabulary if (self._at + index) % 3 == 2 else token
            for index, token in enumerate(planned)
        ]


def _drafts(check: _Checker, plain: Answer) -> Iterator[AnswerFault]:
    """Decodes the last question again, with right and wrong drafts of its answer."""
    session, spec = check.session, check.session.spec
    segments = [check.text(_TEXTS[1])]
    logits = check.prefill(0, segments, session.engine).copy()
    rows = check.start
    progress = Progress()
    lookup = _Planned(plain.tokens, spec.decoder.vocab_size)
    limits = Limits(spec.eos_id, _TOKENS, rows)
    one = Generation(greedy, limits, logits, progress, _DRAFTS, lookup)
    session.clear_caches()  # the rows belong to no question that the session knows
    tokens = [
        token for _, token in decode(SingleDecoder(session.engine, session.table, greedy), [one])
    ]
    answer = replace(plain, tokens=tuple(tokens))
    if problem := check.follow(check.prefill(0, segments), answer, _TOKENS):
        yield AnswerFault("drafts", problem)


def _conversation(check: _Checker, visual: int, plain: Decoding) -> Iterator[AnswerFault]:
    """Two turns. The second one follows the rows of the first answer."""
    chat = check.session.chat(check.pictures[1], visual, plain)
    first, second = (chat.ask(text, _TOKENS // 2) for text in _TEXTS)
    tokenizer = check.session.tokenizer
    turn = [tokenizer.eos_id, *tokenizer.encode(f"USER: {_TEXTS[1]} ASSISTANT:")]
    logits = check.prefill(1, [check.text(_TEXTS[0])])
    if problem := check.follow(logits, first, _TOKENS // 2):
        yield AnswerFault("a conversation's first turn", problem)
        return
    kept, rest = first.tokens[: first.kept_tokens], first.tokens[first.kept_tokens :]
    check.start -= len(first.tokens) - len(kept)
    table = check.session.table
    logits = check.reference.forward(embed_tokens(table, [*rest, *turn]), check.start)
    check.start += len(rest) + len(turn)
    if problem := check.follow(logits, second, _TOKENS // 2):
        yield AnswerFault("a conversation's second turn", problem)


def _beams(check: _Checker, visual: int) -> Iterator[AnswerFault]:
    """Two beams and two tokens, whose best sequence follows from three rows of logits."""
    eos = check.session.spec.eos_id
    first = _log_softmax(check.prefill(0, [check.text(_TEXTS[0])]))
    start, scores = check.start, dict[tuple[int, ...], float]()
    table = check.session.table
    for token in np.argsort(first)[::-1][:2].tolist():
        second = _log_softmax(check.reference.forward(embed_tokens(table, [token]), start))
        for following in np.argsort(second)[::-1][:2].tolist():
            scores[token, following] = float(first[token] + second[following])
    if any(eos in sequence for sequence in scores):
        return  # an end among the best changes how lengths are weighed
    answer = check.session.ask(
        check.pictures[0], _TEXTS[0], "chat", visual, 2, Decoding(beams=2, lookup=0)
    )
    best = max(scores.values())
    found = scores.get(tuple(answer.tokens), -np.inf)
    if best - found > check.allowed * float(first.std()):
        yield AnswerFault("two beams", f"found {answer.tokens}, not the most likely sequence")


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result
