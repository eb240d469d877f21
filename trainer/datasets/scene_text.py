"""Texts about a scene: captions, questions with short answers, grounding phrases with
boxes, and instructions in natural language.

Every sentence is true by construction. A phrase that must name one thing matches
exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from runtime.contract.boxes import format_box
from runtime.contract.prompt import Message
from runtime.contract.spec import ModelSpec
from runtime.data.sample import Example, Sample
from trainer.datasets.phrases import article, listed
from trainer.datasets.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    dense_labels,
    draw_scene,
    pick,
)

__all__ = [
    "CAPTION_PROMPTS",
    "QUESTIONS",
    "SceneSource",
    "caption",
    "chat_samples",
    "corpus",
    "scene_samples",
]

CAPTION_PROMPTS = (
    "describe",
    "describe the image",
    "describe the picture",
    "describe this image",
    "what is in the image?",
    "caption",
)
DESCRIBE = ("Describe the image.", "What do you see?", "What is in the picture?")
LOCATE = ("Where is the {}?", "Find the {}.")


def _full(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def caption(scene: Scene) -> str:
    """Returns a caption that lists all things from left to right with size, colour and
    shape.
    """
    return listed([f"a {_full(thing)}" for thing in scene.things])


def _names(thing: Thing) -> Iterator[str]:
    """Yields phrases that match a thing, shortest first."""
    yield thing.shape
    yield f"{thing.colour} {thing.shape}"
    yield f"{thing.size} {thing.shape}"
    yield _full(thing)


def _fits(phrase: str, thing: Thing) -> bool:
    return set(phrase.split()) <= {thing.size, thing.colour, thing.shape}


def _unique_phrases(scene: Scene, thing: Thing) -> list[str]:
    return [
        phrase
        for phrase in _names(thing)
        if sum(_fits(phrase, other) for other in scene.things) == 1
    ]


def _named_thing(scene: Scene, rng: np.random.Generator) -> tuple[Thing, str] | None:
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[int(index)]
        if phrases := _unique_phrases(scene, thing):
            return thing, pick(rng, phrases)
    return None


def _ask_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
    if not options:
        return None
    thing = options[int(rng.integers(len(options)))]
    return f"what color is the {thing.shape}?", thing.colour


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = [t for t in scene.things if sum(o.colour == t.colour for o in scene.things) == 1]
    if not options:
        return None
    thing = options[int(rng.integers(len(options)))]
    return f"what shape is the {thing.colour} object?", thing.shape


def _ask_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = [
        t
        for t in scene.things
        if sum(o.colour == t.colour and o.shape == t.shape for o in scene.things) == 1
    ]
    if not options:
        return None
    thing = options[int(rng.integers(len(options)))]
    return f"is the {thing.colour} {thing.shape} small or large?", thing.size


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    kind = int(rng.integers(3))
    if kind == 0:
        return "how many objects are there?", str(len(scene.things))
    thing = scene.things[int(rng.integers(len(scene.things)))]
    present = rng.random() < 0.75
    if kind == 1:
        colour = thing.colour if present else pick(rng, list(COLOURS))
        return f"how many {colour} objects are there?", str(
            sum(t.colour == colour for t in scene.things)
        )
    shape = thing.shape if present else pick(rng, SHAPES)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return f"how many {plural} are there?", str(sum(t.shape == shape for t in scene.things))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        return f"is there {article(thing.colour)} {thing.colour} {thing.shape}?", "yes"
    for _ in range(20):
        colour, shape = pick(rng, list(COLOURS)), pick(rng, SHAPES)
        near = any(t.colour == colour or t.shape == shape for t in scene.things)
        if not any(t.colour == colour and t.shape == shape for t in scene.things) and (
            near or rng.random() < 0.5
        ):
            return f"is there {article(colour)} {colour} {shape}?", "no"
    return None


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    named = [
        (thing, phrases[0]) for thing in scene.things if (phrases := _unique_phrases(scene, thing))
    ]
    if len(named) < 2:
        return None
    first, second = (named[int(i)] for i in rng.permutation(len(named))[:2])
    axis = int(rng.integers(2))
    gap = first[0].centre[axis] - second[0].centre[axis]
    if abs(gap) < 0.1:
        return None
    word, holds = (
        ("left of", gap < 0),
        ("right of", gap > 0),
        ("above", gap < 0),
        ("below", gap > 0),
    )[2 * axis + int(rng.integers(2))]
    return f"is the {first[1]} {word} the {second[1]}?", "yes" if holds else "no"


Question = Callable[[Scene, np.random.Generator], tuple[str, str] | None]
QUESTIONS: dict[str, Question] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
}
_TRAINING_SHARES = {
    "colour": 2.0,
    "shape": 1.0,
    "size": 1.0,
    "count": 1.0,
    "existence": 2.0,
    "relation": 3.0,
}
"""How often training tries each kind of question first. Kinds that models learn last
have larger shares. Held-out questions are drawn evenly.
"""


def caption_sample(scene: Scene, rng: np.random.Generator, prompt: str | None = None) -> Sample:
    """Returns a caption sample. The default prompt is "describe" or one of its
    variants.
    """
    return Sample("caption", prompt or pick(rng, CAPTION_PROMPTS), caption(scene), kind="caption")


def vqa_sample(
    scene: Scene, rng: np.random.Generator, shares: Mapping[str, float] | None = None
) -> Sample:
    """Returns a question of a random kind that this scene allows; counting is always
    possible. `shares` gives the odds that each kind is tried first.
    """
    odds = np.array([shares[kind] for kind in QUESTIONS]) if shares else np.ones(len(QUESTIONS))
    for kind in rng.choice(list(QUESTIONS), len(QUESTIONS), replace=False, p=odds / odds.sum()):
        if asked := QUESTIONS[str(kind)](scene, rng):
            return Sample("vqa", *asked, kind=str(kind))
    raise AssertionError("counting is always possible")


def ground_sample(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Returns a phrase that matches exactly one thing, with its box. Returns None if no
    phrase is unique.
    """
    named = _named_thing(scene, rng)
    return (
        Sample("ground", named[1], format_box(named[0].box), box=named[0].box, kind="ground")
        if named
        else None
    )


def scene_samples(
    scene: Scene, rng: np.random.Generator, questions: int = 4, phrases: int = 2
) -> list[Sample]:
    """Returns one caption and several distinct questions and phrases."""
    found = [caption_sample(scene, rng)]
    found += [vqa_sample(scene, rng, _TRAINING_SHARES) for _ in range(questions)]
    found += [sample for _ in range(phrases) if (sample := ground_sample(scene, rng))]
    return list({(s.task, s.text): s for s in found}.values())


def chat_samples(scene: Scene, rng: np.random.Generator, turns: int = 2) -> list[Sample]:
    """Returns instructions in natural language, among them one conversation of two
    turns if a thing has a unique phrase.
    """
    spoken = f"There is {caption(scene)}."
    said: list[tuple[str, str]] = [(pick(rng, DESCRIBE), spoken)]
    for _ in range(turns):
        if named := _named_thing(scene, rng):
            said.append(
                (
                    pick(rng, LOCATE).format(named[1]),
                    f"The {named[1]} is at {format_box(named[0].box)}.",
                )
            )
    samples = [Sample("chat", text, answer, kind="chat") for text, answer in said]
    if len(said) > 1:
        history = (
            Message("user", said[0][0]),
            Message("assistant", said[0][1]),
            Message("user", said[1][0]),
        )
        samples.append(Sample("chat", said[1][0], said[1][1], messages=history, kind="chat"))
    return samples


def corpus() -> Iterator[str]:
    """Yields texts with every word that the scenes use, for building the tokenizer."""
    for size in SIZES:
        for colour in COLOURS:
            for shape in SHAPES:
                yield (
                    f"describe a {size} {colour} {shape}, a {size} {colour} {shape} and the "
                    f"{size} {colour} {shape}."
                )
                yield f"<ref>{size}</ref><ref>{colour}</ref><ref>{shape}</ref>"
                yield (
                    f"where is the {size} {colour} {shape}? is the {colour} {shape} {size} or "
                    f"{size}? {colour} {shape}</ref>"
                )
    for shape in ("circles", "squares", "triangles", "crosses"):
        yield (
            f"how many {shape} are there? what color is the object? what shape is it? how many "
            f"objects are there?"
        )
    yield from CAPTION_PROMPTS
    yield from DESCRIBE
    yield from (text.format("red circle") for text in LOCATE)
    yield (
        "is the circle left of the square? is it right of, above, below, under, the cross? yes "
        "no 0 1 2 3 4"
    )
    yield "Yes No There is The, is there an orange circle?"
    yield (
        "what is in the picture? find locate caption image photo scene background color colour "
        "big tiny none two three one four"
    )


class SceneSource:
    """Draws an endless sequence of new scenes as training examples."""

    dense_classes: tuple[int, ...] = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
    dense_names = (*COLOURS, *SHAPES, *SIZES)

    def draw(self, rng: np.random.Generator, chat: bool, spec: ModelSpec) -> Example:
        """Returns a new scene with its samples and per-patch labels."""
        scene = draw_scene(rng)
        samples = chat_samples(scene, rng) if chat else scene_samples(scene, rng)
        return Example(scene.image, tuple(samples), dense=dense_labels(scene, spec.vision.grid))

    def texts(self) -> list[str]:
        """See `ExampleSource.texts`."""
        return list(corpus())
