"""Runs requests on one engine: fills the key/value cache with the prompt, decodes, and
builds the answer.

A `Runner` owns the cache. A request that begins takes the cache over, and streams that
began earlier and were not read to their end notice. Whoever uses the engine holds the
runner's lock, so that several threads take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.contract.boxes import find_boxes, to_pixel_box
from runtime.contract.errors import UsageError
from runtime.contract.tokenizer import Tokenizer
from runtime.engines import Engine
from runtime.engines.logits import greedy
from runtime.generation.answer_text import AnswerText
from runtime.generation.beam_search import beam_search
from runtime.generation.decoding import Decoding
from runtime.generation.generate import Generation, Limits, Progress, SingleDecoder, decode
from runtime.generation.kv_cache import PrefixCache
from runtime.generation.prompt_lookup import PromptLookup
from runtime.generation.request import Request
from runtime.generation.sampling import Sampler
from runtime.questions import Answer, FoundBox, Stream

__all__ = ["Runner"]


class Runner:
    """Runs one request after another.

    `lock` must be held while the engine or the cache is used.

    Args:
        engine: Computes both graphs.
        tokenizer: Turns tokens into text.
        table: The token embeddings [V, H].
        eos_id: The token that ends an answer.
        row_independent: True if a row of the decoder does not depend on the other rows of
            the same call beyond float rounding, so that drafts may be verified.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        table: NDArray[np.floating],
        eos_id: int,
        row_independent: bool,
    ) -> None:
        self.engine, self.tokenizer, self.table, self.eos_id = engine, tokenizer, table, eos_id
        self.prefix_cache = PrefixCache(engine)
        self.lock = threading.RLock()
        self._can_draft = engine.verifies and row_independent
        self._generation_id = 0

    def start(self, request: Request) -> Stream:
        """Returns a stream that answers a request once it is read. Raises `UsageError`."""
        stream = Stream(iter(()), self.lock)
        draft_length = self.draft_length(request.decoding)
        stream.pieces = self._run(stream, request, draft_length)
        return stream

    def draft_length(self, decoding: Decoding) -> int:
        """Returns how many tokens to draft. Raises `UsageError` where drafting could
        change the answer by more than float rounding does.
        """
        if decoding.lookup and not self._can_draft:
            raise UsageError(
                "this bundle does not support --lookup: its decoder computes a token differently "
                "when several are computed in one call; leave out --lookup, or build for the cpu "
                "with --precision int8-static, int8-weights, int4-all, fp16 or fp32"
            )
        return decoding.lookup

    def begin_generation(self) -> int:
        """Takes the key/value cache for a new use and returns the number of that use. The
        caller holds the lock.
        """
        self._generation_id += 1
        return self._generation_id

    def clear_caches(self) -> None:
        """Forgets which rows the key/value cache holds."""
        with self.lock:
            self.begin_generation()
            self.prefix_cache.clear()

    def prefill(self, request: Request, progress: Progress) -> tuple[NDArray[np.float32], int]:
        """Returns the logits [V] of the prompt's last position, and how many of its
        rows were in the cache already.
        """
        # A conversation asks about the same image again, whose stages then take no time.
        timings = request.image.timings
        timings.update(dict.fromkeys(timings, 0.0))
        started = time.perf_counter()
        try:
            logits, cached = self.prefix_cache.prefill(request.segments)
        except BaseException:
            self.prefix_cache.clear()  # an interrupted call may have written some of its rows
            raise
        elapsed = time.perf_counter() - started
        progress.prefill_seconds = elapsed - sum(timings.values()) / 1e3
        return logits, cached

    def build_answer(self, request: Request, text: str, progress: Progress, cached: int) -> Answer:
        """Builds the answer of a finished generation: reads boxes, collects times."""
        steps = [seconds * 1e3 for seconds in progress.step_seconds]
        timings = request.image.timings | {"prefill": progress.prefill_seconds * 1e3}
        timings["per_token"] = _median(steps) if steps else 0.0
        timings["decode"] = sum(steps)
        phrase = request.text if request.task == "ground" else ""
        return Answer(
            text=text,
            task=request.task,
            boxes=tuple(
                FoundBox(phrase, to_pixel_box(box, *request.image.size), box)
                for box in find_boxes(text)
            ),
            finish_reason=progress.finish_reason,
            tokens=tuple(progress.tokens),
            prompt_tokens=request.budget.prompt_tokens,
            visual_tokens=request.budget.visual_tokens,
            timings=timings,
            cached_tokens=cached,
            drafted_tokens=progress.drafted,
            accepted_tokens=progress.accepted,
            kept_tokens=progress.kept,
            step_ms=tuple(steps),
        )

    def _run(self, stream: Stream, request: Request, draft_length: int) -> Iterator[str]:
        generation_id, progress = self.begin_generation(), Progress()
        text = AnswerText(self.tokenizer, request.decoding.stop)
        logits, cached = self.prefill(request, progress)
        if request.decoding.beams > 1:
            self._search(stream, request, logits, progress)
            tokens: Iterator[int] = iter(tuple(progress.tokens))
        else:
            tokens = self._decode(request, logits, progress, draft_length)
        pushed = 0
        for token in tokens:
            pushed += 1
            if piece := text.push(token):
                yield piece
                self._check_current(generation_id)
            if text.stopped or stream.cancelled:
                progress.finish_reason = "stop" if text.stopped else "cancelled"
                break
        progress.tokens = progress.tokens[:pushed]
        if piece := text.finish():
            yield piece
            self._check_current(generation_id)
        kept = tuple(progress.tokens[: progress.kept])
        self.prefix_cache.extend(("answer", kept), progress.kept)
        stream.answer = self.build_answer(request, text.text, progress, cached)

    def _decode(
        self, request: Request, logits: NDArray[np.float32], progress: Progress, draft_length: int
    ) -> Iterator[int]:
        sampler = Sampler(request.decoding, self.eos_id, request.constraint)
        sample = greedy if sampler.is_greedy else sampler
        lookup = PromptLookup(request.context) if draft_length else None
        limits = self._limits(request)
        one = Generation(sample, limits, logits, progress, draft_length, lookup)
        decoder = SingleDecoder(self.engine, self.table, sample)
        return (token for _, token in decode(decoder, [one]))

    def _limits(self, request: Request) -> Limits:
        return Limits(self.eos_id, request.new_tokens, request.budget.prompt_tokens)

    def _search(
        self, stream: Stream, request: Request, logits: NDArray[np.float32], progress: Progress
    ) -> None:
        stop = request.decoding.stop

        def stopped(tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(tokens).lstrip(" ") if stop else ""
            return any(end in text for end in stop)

        beam_search(
            self.engine,
            self.table,
            logits,
            request.decoding,
            self._limits(request),
            progress,
            request.constraint,
            stopped,
            cancelled=lambda: stream.cancelled,
        )

    def _check_current(self, generation_id: int) -> None:
        if generation_id != self._generation_id:
            raise UsageError(
                "the session was used again before this stream was read to its end; read it "
                "first, or load a second session"
            )


def _median(values: Sequence[float]) -> float:
    """Returns the median. numpy's own function first imports `numpy.ma`, which takes
    several milliseconds of a command that runs for a few hundred.
    """
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
