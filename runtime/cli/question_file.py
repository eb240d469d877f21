"""Reads a JSON-lines file of questions for `infmllm-run --batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.contract.errors import DataError, kind_name
from runtime.questions import Question

__all__ = ["read_questions"]


_MAX_BYTES = 64 << 20


_FIELDS = {"image": str, "prompt": str, "task": str, "visual_tokens": int, "max_new_tokens": int}


def read_questions(
    path: Path, task: str, visual_tokens: int | None, max_new_tokens: int | None
) -> list[Question]:
    """Questions of a jsonl file, `image` relative to its folder; the arguments stand in
    for what a line leaves out. Raises `DataError`.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"{path} is larger than {_MAX_BYTES} bytes; split it into several files"
            )
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
        raise DataError(
            f'{path} holds no questions; write one {{"image": …, "prompt": …}} per line'
        )
    return questions


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); write one object per line") from None
    if not isinstance(row, dict) or not {"image", "prompt"} <= set(row) <= set(_FIELDS):
        raise DataError(
            f"{where}: expected an object with image and prompt (optional: "
            f"{', '.join(list(_FIELDS)[2:])}), found {line[:60]!r}"
        )
    wrong = [name for name, value in row.items() if type(value) is not _FIELDS[name]]
    if wrong:
        raise DataError(
            f"{where}: {wrong[0]} is {row[wrong[0]]!r:.40}, expected {kind_name(_FIELDS[wrong[0]])}"
        )
    return row
