"""A conversation about one image. Each turn computes only what was added, because the
cache still holds the rows of everything before.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.contract.arguments import check_text, whole_number
from runtime.contract.errors import UsageError
from runtime.contract.prompt import Message, checked_text, next_turn, render_chat
from runtime.generation.decoding import Decoding, checked_decoding
from runtime.generation.kv_cache import Segment
from runtime.generation.request import RequestBuilder
from runtime.generation.runner import Runner
from runtime.questions import Answer, ImageSource, Stream

__all__ = ["Chat"]

_TASK = "chat"


class Chat:
    """A conversation; `messages` are its turns so far. Start one with `Session.chat`.

    Threads may share a conversation: turns are then answered one after the other.
    """

    def __init__(
        self,
        builder: RequestBuilder,
        runner: Runner,
        image: ImageSource,
        visual_tokens: int | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self._builder, self._runner = builder, runner
        self._decoding = Decoding() if decoding is None else checked_decoding(decoding)
        self._image = builder.open_image(image, visual_tokens)
        self._segments: tuple[Segment, ...] = ()
        self._uncached: tuple[int, ...] = ()
        """Tokens of the last answer whose rows are not in the cache."""
        self._context: tuple[int, ...] = ()
        self.messages: list[Message] = []

    def ask(self, text: str, max_new_tokens: int | None = None) -> Answer:
        """Answers the next turn.

        Args:
            text: What the user says.
            max_new_tokens: The longest answer in tokens; the task's default if None.

        Returns:
            The answer, which is now part of the conversation.

        Raises:
            ContextError: The conversation no longer fits into the cache.
            PromptError: The turn has no text.
        """
        with self._runner.lock:
            return self.stream(text, max_new_tokens).finish()

    def stream(self, text: str, max_new_tokens: int | None = None) -> Stream:
        """Starts to answer the next turn; arguments and errors are those of `ask`.

        The turn becomes part of the conversation once the stream was read to its end.
        """
        check_text("text", text)
        longest = whole_number("max_new_tokens", max_new_tokens)
        with self._runner.lock:
            return self._begin(Message("user", checked_text(text)), longest)

    def _begin(self, user: Message, max_new_tokens: int | None) -> Stream:
        """Starts a turn; the caller holds the lock, because answering changes the fields."""
        tokenizer = self._builder.tokenizer
        if self.messages:
            new = (*self._uncached, *tokenizer.encode_turn(next_turn(user)))
            segments = (*self._segments, self._builder.text_segment(new))
        else:
            opening, new = map(tuple, tokenizer.encode_prompt(render_chat([user])))
            image = self._builder.image_segment(opening, self._image)
            segments = (image, self._builder.text_segment(new))
        context = (*self._context, *new)
        request = self._builder.build_from_segments(
            self._image, segments, _TASK, user.content, self._decoding, max_new_tokens, context
        )
        stream = self._runner.start(request)
        stream.pieces = self._read(
            stream, stream.pieces, user, segments, context, len(self.messages)
        )
        return stream

    def _read(
        self,
        stream: Stream,
        pieces: Iterator[str],
        user: Message,
        segments: tuple[Segment, ...],
        context: tuple[int, ...],
        turns: int,
    ) -> Iterator[str]:
        """Passes the pieces on, then adds both messages to the conversation, which must
        still have the `turns` messages it had when the turn was begun.
        """
        if len(self.messages) != turns:
            raise UsageError(
                "another turn was answered since this stream was created; call stream() again"
            )
        yield from pieces
        answer = stream.answer
        assert answer is not None, "a stream that was read to its end has an answer"
        kept = answer.tokens[: answer.kept_tokens]
        self._uncached = answer.tokens[answer.kept_tokens :]
        decoded = [self._builder.text_segment(kept, decoded=True)] if kept else []
        self._segments = (*segments, *decoded)
        self._context = (*context, *answer.tokens)
        self.messages += [user, Message("assistant", answer.text)]
