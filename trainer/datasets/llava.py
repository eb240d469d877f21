"""LLaVA conversations: a JSON list of `{image, conversations: [{from: human|gpt,
value}]}`, with images in `images=FOLDER`.
"""

from __future__ import annotations

from runtime.contract.prompt import Message
from runtime.data.bad_rows import Faults, field
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example, Sample
from trainer.datasets.files import picture, read_json, rows

__all__ = ["read"]

_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER = "<image>"


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Reads one example per conversation, with one sample per answer. Each sample
    includes the turns before it. Raises `DataError`.

    Conversations without an image are bad rows, because every sample needs one.
    """
    examples = []
    for index, row in enumerate(rows(read_json(source.path), "", source.path)):
        where = f"{source.path}: row {index}"
        with faults.row(where):
            if isinstance(row, dict) and "image" not in row:
                raise ValueError("the conversation has no image")
            path = picture(source.folder("images"), field(row, "image", str))
            turns = [_turn(turn) for turn in field(row, "conversations", list)]
            if (
                len(turns) < 2
                or len(turns) % 2
                or [t.role for t in turns] != ["user", "assistant"] * (len(turns) // 2)
            ):
                raise ValueError("conversations must alternate human and gpt and end with gpt")
            samples = tuple(_sample(turns[: end + 1]).checked() for end in range(1, len(turns), 2))
            examples.append(Example(path, samples, name=where))
    return examples


def _turn(turn: object) -> Message:
    role = field(turn, "from", str)
    if role not in _ROLES:
        raise ValueError(f'"from" is {role!r:.20}, expected human or gpt')
    text = field(turn, "value", str).replace(_MARKER, "").strip()
    if not text:
        raise ValueError("a turn has no text")
    return Message(_ROLES[role], text)


def _sample(turns: list[Message]) -> Sample:
    kind = "first turn" if len(turns) == 2 else "later turn"
    return Sample(
        "chat", turns[-2].content, turns[-1].content, messages=tuple(turns[:-1]), kind=kind
    )
