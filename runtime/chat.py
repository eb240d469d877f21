"""A conversation about one picture: each turn computes only what was added, the rows of
everything before are in the key/value cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.contract.errors import UsageError
from runtime.contract.prompt import Message, checked_text, next_turn, render_chat
from runtime.generation.decoding import Decoding
from runtime.generation.kv_cache import CacheBudget, Segment
from runtime.generation.request import Job, PictureSource
from runtime.questions import Answer, Stream
from runtime.session import Session

__all__ = ["Chat"]

_TASK = "chat"


class Chat:
    """A conversation. `messages` are its turns so far."""

    def __init__(
        self,
        session: Session,
        image: PictureSource,
        visual_tokens: int | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self._session, self._decoding = session, decoding or Decoding()
        self._picture = session.picture(image, visual_tokens)
        self._segments: tuple[Segment, ...] = ()
        self._unfed: tuple[int, ...] = ()
        self._context: tuple[int, ...] = ()
        self.messages: list[Message] = []

    def ask(self, text: str, max_new_tokens: int | None = None) -> Answer:
        """Answers the next turn. Raises `ContextError` when the conversation no longer
        fits, `PromptError` for a turn without text.
        """
        return self.stream(text, max_new_tokens).finish()

    def stream(self, text: str, max_new_tokens: int | None = None) -> Stream:
        """Starts answering the next turn; it becomes part of the conversation once the
        stream has been read to its end.
        """
        session, user = self._session, Message("user", checked_text(text))
        if self.messages:
            new = (*self._unfed, *session.tokenizer.encode(next_turn(user)))
            segments = (*self._segments, session.text_segment(new))
        else:
            opening, new = map(tuple, session.tokenizer.encode_prompt(render_chat([user])))
            segments = (session.image_segment(opening, self._picture), session.text_segment(new))
        visual = self._picture.p**2
        budget = CacheBudget(
            session.engine.capacity, sum(segment.rows for segment in segments) - visual, visual
        )
        limit, constraint = (
            session.limit(_TASK, budget, max_new_tokens),
            session.constraint(_TASK, self._decoding),
        )
        context = (*self._context, *new)
        stream = session.start(
            Job(
                self._picture,
                _TASK,
                user.content,
                segments,
                budget,
                limit,
                self._decoding,
                constraint,
                context,
            )
        )
        stream.pieces = self._kept(stream, stream.pieces, self._segments, user, segments, context)
        return stream

    def _kept(
        self,
        stream: Stream,
        pieces: Iterator[str],
        before: tuple[Segment, ...],
        user: Message,
        segments: tuple[Segment, ...],
        context: tuple[int, ...],
    ) -> Iterator[str]:
        if self._segments is not before:
            raise UsageError("another turn was answered since this one was begun; begin it again")
        yield from pieces
        answer = stream.answer
        assert answer is not None, "a finished stream has its answer"
        fed = answer.tokens[: answer.kept_tokens]
        self._segments = (
            *segments,
            *([self._session.text_segment(fed, generated=True)] if fed else []),
        )
        self._unfed, self._context = answer.tokens[answer.kept_tokens :], (*context, *answer.tokens)
        self.messages += [user, Message("assistant", answer.text)]
