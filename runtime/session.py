"""A loaded bundle that answers questions about pictures: image and text in, text and
boxes out.

Read top to bottom: render and embed the prompt (the image only if no cache knows it),
prefill what is not in the key/value cache, decode, read boxes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.contract.boxes import find_boxes, to_pixel_box
from runtime.contract.bundle import ALONE, ROWS, TOKENIZER, Bundle, read_bundle
from runtime.contract.errors import UsageError
from runtime.contract.prompt import TASKS, Prompt, detect_task, render
from runtime.contract.tokenizer import Tokenizer
from runtime.engines import Engine, EngineOptions, load_engine
from runtime.generation.beam_search import beam_search
from runtime.generation.constraints import BoxGrammar, Constraint, JsonSchema
from runtime.generation.decoding import Decoding
from runtime.generation.generate import Generation, Limits, generate
from runtime.generation.image_cache import FeatureCache
from runtime.generation.kv_cache import CacheBudget, Prefix, Segment
from runtime.generation.prompt_lookup import Lookup
from runtime.generation.request import Job, Picture, PictureSource
from runtime.generation.sampling import Chooser, greedy
from runtime.generation.token_embeddings import embedded, open_table
from runtime.questions import Answer, AnswerText, FoundBox, Stream

if TYPE_CHECKING:
    from runtime.chat import Chat

__all__ = ["Question", "Session", "load"]

AUTO = "auto"
_LOOKUP = 4  # tokens drafted at most, where that is on by itself
_DEFAULT = Decoding()


@dataclass(frozen=True)
class Question:
    """One of several questions: see `Session.stream` for the fields."""

    image: PictureSource
    text: str
    task: str = AUTO
    visual_tokens: int | None = None
    max_new_tokens: int | None = None


class Session:
    """A bundle in memory. Not safe for concurrent use; create one per thread or process
    (weights are shared read-only by the system).
    """

    def __init__(self, bundle: Bundle, engine: Engine, image_cache: int = 0) -> None:
        self.bundle, self.spec, self.engine = bundle, bundle.spec, engine
        self.tokenizer = Tokenizer.load(bundle.file(TOKENIZER), bundle.spec)
        self.table = open_table(bundle)
        """The token embeddings [V, H], mapped into memory."""
        self.prefix = Prefix(engine)
        self._images = FeatureCache(
            f"{bundle.identity}:{engine.version}", bundle.spec.decoder.hidden, disk=image_cache
        )
        self._drafts = engine.verifies and bundle.schemes.get(ROWS) == ALONE
        self._boxes: BoxGrammar | None = None
        self._schema: tuple[str, JsonSchema] | None = None
        self.turn = 0

    def ask(
        self,
        image: PictureSource,
        text: str,
        task: str = AUTO,
        visual_tokens: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = _DEFAULT,
    ) -> Answer:
        """Answers one question. See `stream` for the parameters."""
        return self.stream(image, text, task, visual_tokens, max_new_tokens, decoding).finish()

    def stream(
        self,
        image: PictureSource,
        text: str,
        task: str = AUTO,
        visual_tokens: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = _DEFAULT,
    ) -> Stream:
        """Starts answering; the returned `Stream` yields text as it is generated.

        `image` is a path, an image file's bytes or an RGB `PIL.Image`; `task` one of
        caption, vqa, ground, chat or auto; `visual_tokens` one of the sizes the model
        serves (default: its best); `max_new_tokens` defaults to the task's published
        limit. Raises `InfMLLMError`s.
        """
        return self.start(
            self._job(Question(image, text, task, visual_tokens, max_new_tokens), decoding)
        )

    def ask_many(
        self, questions: Sequence[Question], decoding: Decoding = _DEFAULT
    ) -> list[Answer]:
        """Answers several questions, decoding up to eight side by side: the weights are
        read once for all of them.

        With `beams` they are answered one after the other. Nothing is computed unless
        all prompts fit. Raises `InfMLLMError`s.
        """
        from runtime.generation.batch import decode_together

        if decoding.lookup:
            raise UsageError(
                f"lookup {decoding.lookup} is for one question at a time; leave it out"
            )
        jobs = [self._job(question, decoding) for question in questions]
        return (
            [self.start(job).finish() for job in jobs]
            if decoding.beams > 1
            else decode_together(self, jobs)
        )

    def check(self, question: Question, decoding: Decoding = _DEFAULT) -> None:
        """Raises what answering would raise before anything is computed: a missing
        picture, a prompt too long, options that do not fit.
        """
        self._drafted(self._job(question, decoding).decoding)

    def chat(
        self, image: PictureSource, visual_tokens: int | None = None, decoding: Decoding = _DEFAULT
    ) -> Chat:
        """Starts a conversation about a picture: `chat.ask("…")`, `chat.stream("…")`."""
        from runtime.chat import Chat

        return Chat(self, image, visual_tokens, decoding)

    def answer_prompt(
        self,
        image: PictureSource,
        prompt: Prompt,
        task: str,
        text: str = "",
        visual_tokens: int | None = None,
    ) -> Answer:
        """Answers an already rendered prompt, such as a conversation, as the model by
        itself would; `text` is the phrase that boxes stand for.
        """
        return self.start(
            self._prepared(
                image, prompt, task, text, visual_tokens, None, Decoding(constrain=False)
            )
        ).finish()

    def forget(self) -> None:
        """Drops what was kept for the next question: key/value rows and image
        embeddings in memory.
        """
        self.claim()
        self.prefix.forget()
        self._images.forget()

    def _job(self, question: Question, decoding: Decoding) -> Job:
        task, text = (
            detect_task(question.text) if question.task == AUTO else (question.task, question.text)
        )
        return self._prepared(
            question.image,
            render(task, text),
            task,
            text,
            question.visual_tokens,
            question.max_new_tokens,
            decoding,
        )

    def _prepared(
        self,
        image: PictureSource,
        prompt: Prompt,
        task: str,
        text: str,
        visual_tokens: int | None,
        max_new_tokens: int | None,
        decoding: Decoding,
    ) -> Job:
        p = self.spec.pool_size_for(visual_tokens)
        before, after = map(tuple, self.tokenizer.encode_prompt(prompt))
        budget = CacheBudget(self.engine.capacity, len(before) + len(after), p * p)
        limit = self.limit(task, budget, max_new_tokens)
        picture = self.picture(image, visual_tokens)
        segments = (self.image_segment(before, picture), self.text_segment(after))
        return Job(
            picture,
            task,
            text,
            segments,
            budget,
            limit,
            decoding,
            self.constraint(task, decoding),
            after,
        )

    def picture(self, image: PictureSource, visual_tokens: int | None = None) -> Picture:
        """A picture to ask about, its embeddings made when they are needed. Raises
        `ImageError`, `SpecError`.
        """
        return Picture(
            image, self.spec.pool_size_for(visual_tokens), self.spec, self.engine, self._images
        )

    def limit(self, task: str, budget: CacheBudget, max_new_tokens: int | None) -> int:
        """How many tokens may be generated. Raises `ContextError`, `UsageError`."""
        limit = TASKS[task].max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise UsageError(f"at most {limit} new tokens were asked for, expected at least 1")
        return budget.allow(limit)

    def image_segment(self, before: tuple[int, ...], picture: Picture) -> Segment:
        """The rows of the text before the image, and of the image."""
        key = ("image", before, picture.digest, picture.p)
        return Segment(
            key,
            len(before) + picture.p**2,
            lambda: self.embed_prompt(list(before), picture.features.embeds, []),
        )

    def text_segment(self, ids: tuple[int, ...], generated: bool = False) -> Segment:
        """The rows of tokens, that were given or generated."""
        return Segment(
            ("answer" if generated else "text", ids),
            len(ids),
            lambda: embedded(self.table, ids),
            generated,
        )

    def constraint(self, task: str, decoding: Decoding) -> Constraint | None:
        """What the answer is held to, if anything."""
        vocabulary = self.spec.decoder.vocab_size
        if decoding.schema is not None:
            if self._schema is None or self._schema[0] != decoding.schema:
                self._schema = (
                    decoding.schema,
                    JsonSchema(self.tokenizer, vocabulary, decoding.schema),
                )
            return self._schema[1]
        if task != "ground" or not decoding.constrain:
            return None
        if self._boxes is None:
            self._boxes = BoxGrammar(self.tokenizer, vocabulary)
        return self._boxes

    def start(self, job: Job) -> Stream:
        """A stream that answers a prepared question once it is read."""
        stream = Stream(iter(()))
        drafts = self._drafted(job.decoding)
        stream.pieces = self._run(stream, job, drafts)
        return stream

    def _drafted(self, decoding: Decoding) -> int:
        """How many tokens to draft. Raises `UsageError` where drafting could change the
        answer.
        """
        if decoding.lookup is None:
            return _LOOKUP if self._drafts and decoding.beams == 1 else 0
        if decoding.lookup and not self._drafts:
            raise UsageError(
                "this bundle cannot check looked-up tokens without changing the answer (what "
                "becomes of a token depends on those of the same step); "
                "leave --lookup out, or build for the cpu with --precision int8-weights, "
                "int4-all, fp16 or fp32"
            )
        return decoding.lookup

    def _run(self, stream: Stream, job: Job, drafts: int) -> Iterator[str]:
        turn, progress, words = (
            self.claim(),
            Generation(),
            AnswerText(self.tokenizer, job.decoding.stop),
        )
        logits, cached = self.prefill(job, progress)
        limits = Limits(self.spec.eos_id, job.limit, job.budget.prompt_tokens)
        if job.decoding.beams > 1:
            self._search(stream, job, logits, limits, progress)
            tokens = iter(progress.tokens)
        else:
            chooser = Chooser(job.decoding, self.spec.eos_id, job.constraint)
            context = Lookup(job.context) if drafts else None
            tokens = generate(
                self.engine,
                self.table,
                logits,
                greedy if chooser.simple else chooser,
                limits,
                progress,
                drafts,
                context,
            )
        pushed = 0
        for token in tokens:
            pushed += 1
            if piece := words.push(token):
                yield piece
                self._still(turn)
            if words.stopped or stream.cancelled:
                progress.finish_reason = "stop" if words.stopped else "cancelled"
                break
        progress.tokens = progress.tokens[:pushed]
        if piece := words.finish():
            yield piece
            self._still(turn)
        self.prefix.extend(("answer", tuple(progress.tokens[: progress.exact])), progress.exact)
        stream.answer = self.answered(job, words.text, progress, cached)

    def claim(self) -> int:
        """Takes the key/value cache for a new use; streams that were begun before and
        not read to their end notice. Returns the turn's number.
        """
        self.turn += 1
        return self.turn

    def _still(self, turn: int) -> None:
        if turn != self.turn:
            raise UsageError(
                "the session was used again before this stream was read to its end; read it "
                "first, or load a second session"
            )

    def _search(
        self,
        stream: Stream,
        job: Job,
        logits: NDArray[np.float32],
        limits: Limits,
        progress: Generation,
    ) -> None:
        def stopped(tokens: Sequence[int]) -> bool:
            said = self.tokenizer.decode(tokens).lstrip(" ") if job.decoding.stop else ""
            return any(text in said for text in job.decoding.stop)

        beam_search(
            self.engine,
            self.table,
            logits,
            job.decoding,
            limits,
            progress,
            job.constraint,
            stopped,
            cancelled=lambda: stream.cancelled,
        )

    def prefill(self, job: Job, progress: Generation) -> tuple[NDArray[np.float32], int]:
        """The prompt's last logits [V], and how many of its rows were in the cache
        already.
        """
        job.picture.timings.update(
            dict.fromkeys(job.picture.timings, 0.0)
        )  # a conversation asks about the same one again
        started = time.perf_counter()
        try:
            logits, cached = self.prefix.prefill(job.segments)
        except BaseException:
            self.prefix.forget()  # an interrupted call may have written some of its rows
            raise
        progress.prefill_seconds = (
            time.perf_counter() - started - sum(job.picture.timings.values()) / 1e3
        )
        return logits, cached

    def answered(self, job: Job, text: str, progress: Generation, cached: int) -> Answer:
        """The answer of a finished generation: boxes read, times gathered."""
        steps = [seconds * 1e3 for seconds in progress.step_seconds]
        timings = job.picture.timings | {"prefill": progress.prefill_seconds * 1e3}
        timings |= {"per_token": float(np.median(steps)) if steps else 0.0, "decode": sum(steps)}
        phrase = job.text if job.task == "ground" else ""
        found = find_boxes(text)
        boxes = tuple(FoundBox(phrase, to_pixel_box(box, *job.picture.size), box) for box in found)
        return Answer(
            text, job.task, boxes, progress.finish_reason, tuple(progress.tokens), job.budget.prompt_tokens, job.budget.visual_tokens, timings,
            cached, progress.drafted, progress.accepted, progress.exact, tuple(steps),
        )  # fmt: skip

    def embed_prompt(
        self, before: list[int], image_embeds_TH: NDArray[np.float32], after: list[int]
    ) -> NDArray[np.float32]:
        """Input embeddings [1, L, H]: text before, visual embeddings, text after."""
        return np.concatenate(
            [self.table[before], image_embeds_TH, self.table[after]], dtype=np.float32
        )[None]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    context: int | None = None,
    image_cache: int = 0,
    engine_cache: bool = True,
) -> Session:
    """Opens a bundle, checks it, and loads its engine.

    `threads` defaults to all available cores, `context` (cache rows) to the model's.
    `image_cache` is how many bytes of image embeddings may be kept on disk for other
    processes (`runtime.generation.image_cache.DISK_BYTES` is what `infmllm-run` uses),
    none by default. With `engine_cache` large weights are kept there in the form this
    CPU's kernels want. Engines compiled on this machine reproduce the bundle's goldens
    once before they answer. Raises `BundleError`, `EngineError`.
    """
    bundle = read_bundle(Path(path))
    bundle.verify_once()
    engine = load_engine(bundle, EngineOptions(threads, context, engine_cache))
    if engine.trial is not None:
        from runtime.parity import try_engine

        try_engine(Session(bundle, engine))
    return Session(bundle, engine, image_cache)
