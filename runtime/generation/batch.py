"""Answers several requests side by side: each prompt is computed alone, then every
decode step takes one token of each.

A decode step reads all weights once, however many sequences share it. Finished
sequences leave the batch, so it never waits for the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.generation.answer_text import AnswerText
from runtime.generation.generate import BatchDecoder, Generation, Limits, Progress, decode
from runtime.generation.request import Request
from runtime.generation.runner import Runner
from runtime.generation.sampling import Sampler
from runtime.questions import Answer

__all__ = ["BATCH_SIZE", "answer_batch"]

BATCH_SIZE = 8
"""Sequences decoded at a time: each holds a cache of its own."""


def answer_batch(runner: Runner, requests: Sequence[Request]) -> list[Answer]:
    """Answers requests in their order, `BATCH_SIZE` at a time; other threads wait
    meanwhile. Raises `InfMLLMError`s.
    """
    with runner.lock:
        return [
            answer
            for start in range(0, len(requests), BATCH_SIZE)
            for answer in _answer_together(runner, requests[start : start + BATCH_SIZE])
        ]


def _answer_together(runner: Runner, requests: Sequence[Request]) -> list[Answer]:
    runner.begin_generation()
    rows = max(request.budget.prompt_tokens + request.new_tokens for request in requests)
    batch = runner.engine.batch(len(requests), rows)
    texts = [AnswerText(runner.tokenizer, request.decoding.stop) for request in requests]
    generations, cached_rows = [], []
    for slot, request in enumerate(requests):
        progress = Progress()
        logits, cached = runner.prefill(request, progress)
        prompt_rows = request.budget.prompt_tokens
        # The next prompt overwrites the engine's own cache and its logits.
        batch.fill(slot, prompt_rows)
        sampler = Sampler(request.decoding, runner.eos_id, request.constraint)
        limits = Limits(runner.eos_id, request.new_tokens, prompt_rows)
        generations.append(Generation(sampler, limits, logits.copy(), progress))
        cached_rows.append(cached)
    for index, token in decode(BatchDecoder(batch, runner.table), generations):
        texts[index].push(token)
        if texts[index].stopped:
            generations[index].progress.finish_reason = "stop"
    for text in texts:
        text.finish()
    return [
        runner.build_answer(request, text.text, one.progress, cached)
        for request, text, one, cached in zip(
            requests, texts, generations, cached_rows, strict=True
        )
    ]
