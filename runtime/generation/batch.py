"""Several questions decoded side by side: each prompt is computed by itself, then every
step takes one token of each.

A decoding step reads all weights once, however many sequences share it. Finished
sequences leave the batch, so it never waits for the longest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import DataError
from runtime.generation.generate import Generation
from runtime.generation.request import Job
from runtime.generation.sampling import Chooser
from runtime.questions import Answer, AnswerText

if TYPE_CHECKING:
    from runtime.session import Question, Session

__all__ = ["WAVE", "decode_together", "read_questions"]

WAVE = 8
"""Sequences decoded at a time: each holds a cache of its own."""

_MAX_BYTES = 64 << 20
_FIELDS = {"image": str, "prompt": str, "task": str, "visual_tokens": int, "max_new_tokens": int}


@dataclass
class _Sequence:
    job: Job
    chooser: Chooser
    words: AnswerText
    eos_id: int
    cached: int = 0
    rows: int = 0
    progress: Generation = field(default_factory=Generation)

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Chooses the next token from logits [V]; False when the answer is finished."""
        token, progress = self.chooser(logits), self.progress
        if token == self.eos_id:
            progress.finish_reason = "stop"
            return False
        progress.tokens.append(token)
        self.words.push(token)
        if self.words.stopped:
            progress.finish_reason = "stop"
        elif len(progress.tokens) >= self.job.limit:
            progress.finish_reason = "length"
        return not progress.finish_reason


def decode_together(session: Session, jobs: Sequence[Job]) -> list[Answer]:
    """Answers in the order of the jobs."""
    return [
        answer
        for start in range(0, len(jobs), WAVE)
        for answer in _wave(session, jobs[start : start + WAVE])
    ]


def _wave(session: Session, jobs: Sequence[Job]) -> list[Answer]:
    eos = session.spec.eos_id
    session.claim()
    batch = session.engine.batch(
        len(jobs), max(job.budget.prompt_tokens + job.limit for job in jobs)
    )
    everyone: list[_Sequence] = []
    active: list[_Sequence] = []
    for job in jobs:
        one = _Sequence(
            job,
            Chooser(job.decoding, eos, job.constraint),
            AnswerText(session.tokenizer, job.decoding.stop),
            eos,
        )
        logits, one.cached = session.prefill(job, one.progress)
        one.rows = job.budget.prompt_tokens
        everyone.append(one)
        if one.take(logits):
            batch.fill(len(active), one.rows)
            active.append(one)
    while active:
        started = time.perf_counter()
        tokens = [one.progress.tokens[-1] for one in active]
        logits = batch.step(
            session.table[tokens][:, None], np.array([one.rows for one in active], np.int32)
        )
        seconds = time.perf_counter() - started
        going = []
        for slot, one in enumerate(active):
            one.rows += 1
            one.progress.step_seconds.append(seconds)
            if one.take(logits[slot]):
                going.append(slot)
        batch.copy(going, 0, max(one.rows for one in active))
        active = [active[slot] for slot in going]
    for one in everyone:
        one.words.finish()
    return [session.answered(one.job, one.words.text, one.progress, one.cached) for one in everyone]


def read_questions(
    path: Path, task: str, visual_tokens: int | None, max_new_tokens: int | None
) -> list[Question]:
    """Questions of a jsonl file, `image` relative to its folder; the arguments stand in
    for what a line leaves out. Raises `DataError`.
    """
    from runtime.session import Question

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES} bytes; split it")
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a jsonl file of questions"
        ) from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line, f"{path}:{number}")
            settings = {
                "task": task,
                "visual_tokens": visual_tokens,
                "max_new_tokens": max_new_tokens,
            } | row
            questions.append(
                Question(path.parent / settings.pop("image"), settings.pop("prompt"), **settings)
            )
    if not questions:
        raise DataError(f'{path} holds no questions; write one {{"image": …, "prompt": …}} a line')
    return questions


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); write one object a line") from None
    if not isinstance(row, dict) or not {"image", "prompt"} <= set(row) <= set(_FIELDS):
        raise DataError(
            f"{where}: expected an object with image and prompt, and perhaps "
            f"{', '.join(list(_FIELDS)[2:])}; found {line[:60]!r}"
        )
    wrong = [name for name, value in row.items() if type(value) is not _FIELDS[name]]
    if wrong:
        raise DataError(
            f"{where}: {wrong[0]} is {row[wrong[0]]!r:.40}, expected {_FIELDS[wrong[0]].__name__}"
        )
    return row
