"""A loaded bundle that answers questions about images: image and text in, text and
boxes out.

`Session` is a facade: `runtime.generation.request` turns questions into requests, and
`runtime.generation.runner` runs them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.chat import Chat
from runtime.contract.bundle import TOKENIZER, Bundle, read_bundle
from runtime.contract.errors import UsageError
from runtime.contract.goldens import Golden
from runtime.contract.prompt import Prompt
from runtime.contract.tokenizer import Tokenizer
from runtime.engines import Engine, EngineOptions, load_engine
from runtime.generation.batch import answer_batch
from runtime.generation.decoding import Decoding, checked_decoding
from runtime.generation.image_cache import ImageEmbeddingCache
from runtime.generation.request import RequestBuilder
from runtime.generation.runner import Runner
from runtime.generation.token_embeddings import open_token_embeddings
from runtime.parity import StageError, read_checked_goldens, replay_goldens, validate_engine
from runtime.questions import AUTO, Answer, ImageSource, Question, Stream

__all__ = ["Session", "load"]

_DEFAULT = Decoding()


class Session:
    """A bundle in memory, ready to answer. `load` makes one.

    Threads may share a session: their questions are answered one after the other. To
    compute answers at the same time, load one session per process; the operating system
    shares the weights between them.
    """

    def __init__(self, bundle: Bundle, engine: Engine, image_cache: int = 0) -> None:
        self.bundle, self.spec, self.engine = bundle, bundle.spec, engine
        self.tokenizer = Tokenizer.load(bundle.file(TOKENIZER), bundle.spec)
        self.table = open_token_embeddings(bundle)
        """The token embeddings [V, H], mapped into memory."""
        self._images = ImageEmbeddingCache(
            f"{bundle.identity}:{engine.version}", bundle.spec.decoder.hidden, disk=image_cache
        )
        self.builder = RequestBuilder(bundle.spec, self.tokenizer, self.table, engine, self._images)
        self.runner = Runner(
            engine, self.tokenizer, self.table, bundle.spec.eos_id, bundle.row_independent
        )

    def ask(
        self,
        image: ImageSource,
        text: str,
        task: str = AUTO,
        visual_tokens: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = _DEFAULT,
    ) -> Answer:
        """Answers one question.

        Args:
            image: A path, the bytes of an image file, or an RGB `PIL.Image`.
            text: The question, for example "describe" or "where is the red circle?".
            task: "caption", "vqa", "ground", "chat", or "auto" to detect it from the text.
            visual_tokens: One of the numbers of visual tokens that the model serves; its
                default if None. Fewer are faster.
            max_new_tokens: The longest answer in tokens; the task's published limit if None.
            decoding: How tokens are chosen; greedily by default.

        Returns:
            The answer, with its boxes in pixels of the displayed image.

        Raises:
            InfMLLMError: The image, the question or an option does not fit; the subclass and
                the message say which.
        """
        return self.stream(image, text, task, visual_tokens, max_new_tokens, decoding).finish()

    def stream(
        self,
        image: ImageSource,
        text: str,
        task: str = AUTO,
        visual_tokens: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = _DEFAULT,
    ) -> Stream:
        """Starts to answer one question; arguments and errors are those of `ask`.

        Returns:
            A stream that yields the text while it is generated.
        """
        question = Question(image, text, task, visual_tokens, max_new_tokens)
        return self.runner.start(self.builder.build(question, decoding))

    def ask_many(
        self, questions: Sequence[Question], decoding: Decoding = _DEFAULT
    ) -> list[Answer]:
        """Answers several questions and decodes up to eight side by side, which reads
        the weights once for all of them.

        Args:
            questions: The questions, about the same or about different images.
            decoding: How tokens are chosen. With beam search the questions are answered one
                after the other.

        Returns:
            The answers, in the order of the questions.

        Raises:
            InfMLLMError: One of the questions does not fit; nothing was computed then.
        """
        if checked_decoding(decoding).lookup:
            raise UsageError(
                f"lookup {decoding.lookup} works only for one question at a time; leave it out"
            )
        requests = [self.builder.build(question, decoding) for question in questions]
        if decoding.beams > 1:
            return [self.runner.start(request).finish() for request in requests]
        return answer_batch(self.runner, requests)

    def check(self, question: Question, decoding: Decoding = _DEFAULT) -> None:
        """Raises the error that answering would raise before it computes anything: a
        missing image, a prompt that is too long, options that do not fit.
        """
        self.runner.draft_length(self.builder.build(question, decoding).decoding)

    def chat(
        self, image: ImageSource, visual_tokens: int | None = None, decoding: Decoding = _DEFAULT
    ) -> Chat:
        """Starts a conversation about an image: `chat.ask("…")`, `chat.stream("…")`."""
        return Chat(self.builder, self.runner, image, visual_tokens, decoding)

    def answer_prompt(
        self,
        image: ImageSource,
        prompt: Prompt,
        task: str,
        text: str = "",
        visual_tokens: int | None = None,
    ) -> Answer:
        """Answers a rendered prompt, such as a conversation, without any constraint on
        the answer. `text` is the phrase that boxes in the answer belong to.
        """
        opened = self.builder.open_image(image, visual_tokens)
        decoding = Decoding(constrain=False)
        request = self.builder.build_from_prompt(opened, prompt, task, text, decoding)
        return self.runner.start(request).finish()

    def replay(
        self,
        goldens: Sequence[Golden] | None = None,
        tolerance: Mapping[str, float] | None = None,
    ) -> list[StageError]:
        """Replays golden cases through the engine and compares with PyTorch's results.

        Args:
            goldens: The cases; the bundle's own if None.
            tolerance: The largest error of each stage; the bundle's own if None.

        Returns:
            The errors of the stages vision, prefill and decode.
        """
        if goldens is None:
            goldens = read_checked_goldens(self.bundle)
        if tolerance is None:
            tolerance = self.bundle.tolerance
        with self.runner.lock:
            self.clear_caches()  # the replay overwrites their rows
            return replay_goldens(self.engine, self.table, self.spec, goldens, tolerance)

    def clear_caches(self) -> None:
        """Drops what is kept for the next question: key/value rows, and image
        embeddings in memory.
        """
        with self.runner.lock:
            self.runner.clear_caches()
            self._images.clear()


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    context: int | None = None,
    image_cache: int = 0,
    engine_cache: bool = True,
) -> Session:
    """Opens a bundle, checks it, and loads its engine.

    An engine that was compiled on this machine must first reproduce the bundle's golden
    cases.

    Args:
        path: The bundle's folder.
        threads: CPU threads; all available cores if None.
        context: Rows of the key/value cache; the model's context if None.
        image_cache: How many bytes of image embeddings to keep on disk for other processes;
            `infmllm-run` uses `runtime.generation.image_cache.DISK_BYTES`.
        engine_cache: Whether to keep large weights on disk, prepacked for this CPU.

    Returns:
        A session.

    Raises:
        BundleError: The bundle is damaged or from another version.
        EngineError: The engine cannot be loaded, or does not reproduce the golden cases.
    """
    bundle = read_bundle(Path(path))
    stamp = bundle.stamp()
    bundle.verify_once()
    engine = load_engine(bundle, EngineOptions(threads, context, engine_cache))
    if engine.validation is not None:
        validate_engine(bundle, engine, open_token_embeddings(bundle))
    session = Session(bundle, engine, image_cache)
    bundle.check_unchanged(stamp)  # the engine, the table and the tokenizer are one bundle's
    return session
