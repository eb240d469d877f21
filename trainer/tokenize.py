"""Builds the nano preset's tokenizer: byte-level BPE over the sentences of the
synthetic scenes.

Byte-level BPE can encode any Unicode text. Each word of the scenes becomes one token. A
coordinate with its separator (`0.12`, `,0.34`, ` 0.56`) is also one token, so a box
takes four decode steps. Other presets bring their own `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime.contract.prompt import CHAT_SYSTEM, TASKS

__all__ = ["build_tokenizer"]

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 as in LLaMA
_COORDINATE = r"[ ,]?[01]\.\d\d"
_PIECES = rf"{_COORDINATE}|Question:| Short answer:|</?[a-z]+>| ?[A-Za-z]+| ?\d|\s+| ?[^\sA-Za-z\d]"
_VOCABULARY = 1400


def _coordinates() -> Iterator[str]:
    for hundredths in range(101):
        yield from (f"{prefix}{hundredths / 100:.2f}" for prefix in ("", " ", ","))


def build_tokenizer(corpus: Iterable[str], words: Sequence[str] = ()) -> Tokenizer:
    """Builds a tokenizer from the words of `corpus` and `words`, the task templates and
    all two-decimal coordinates. The result is deterministic.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    templates = [task.render("describe") for task in TASKS.values()]
    texts = [
        *corpus,
        *(text for prompt in templates for text in (prompt.before, prompt.after)),
        CHAT_SYSTEM,
    ]
    texts += list(_coordinates())
    texts += [form for word in words for form in (word, f" {word}")]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY
        + sum(
            2 * len(word.encode()) + 1 for word in words
        ),  # room for all merges of new words, so that coordinates stay tokens
        min_frequency=0,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts * 2, trainer)
    return tokenizer
