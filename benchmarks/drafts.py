"""Counts the answers that change when every token is verified as a draft, among others,
instead of computed alone. Kernels of several rows may round differently.

python benchmarks/drafts.py BUNDLE [BUNDLE ...] [--answers 2000] [--drafts 4] [--tokens 24]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.contract.image import to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.data.sample import Sample
from runtime.engines.logits import greedy
from runtime.generation.generate import Generation, Limits, SingleDecoder, decode
from runtime.generation.token_embeddings import embed_prompt
from runtime.session import Session, load
from trainer.datasets.held_out import held_out_scenes
from trainer.datasets.scene_text import chat_samples
from trainer.datasets.scenes import draw_scene


class Drafted(Generation):
    """A generation whose drafts are the tokens of a known answer."""

    planned: Sequence[int] = ()
    most: int = 0

    def draft(self, capacity: int) -> list[int]:
        """Returns the tokens that followed in the known answer."""
        at = len(self.progress.tokens)
        room = min(self.most, self.limits.new_tokens - at - 1, capacity - self.rows - 1)
        self.drafts = list(self.planned[at : at + max(room, 0)])
        return self.drafts


def questions(count: int) -> Iterator[tuple[np.ndarray, int, Sample]]:
    """Yields pixels-to-be, an index and a sample of all four tasks."""
    for index, example in enumerate(held_out_scenes(count)):
        image, samples = example.load()
        for sample in samples:
            yield np.asarray(image.convert("RGB")), index, sample
        rng = np.random.default_rng((17, index))
        scene = draw_scene(rng)
        for sample in chat_samples(scene, rng):
            yield np.asarray(scene.image.convert("RGB")), index, sample


def changed_answers(session: Session, count: int, most: int, tokens: int) -> dict[str, object]:
    """Answers every question twice and returns the counts."""
    spec, engine, table = session.spec, session.engine, session.table
    changed = accepted = drafted = total = 0
    for picture, index, sample in islice(questions(count), count):
        p = spec.pool_sizes[index % len(spec.pool_sizes)]
        pixels = to_pixels(Image.fromarray(picture), spec)
        embeds = engine.embed_image(pixels, pool_matrix(spec.vision.grid, p))[0]
        before, after = session.tokenizer.encode_prompt(sample.prompt())
        inputs = embed_prompt(table, before, embeds, after)
        limits = Limits(spec.eos_id, tokens, len(inputs[0]))
        answers: list[list[int]] = []
        for most_drafts in (0, most):
            one = Drafted(greedy, limits, engine.forward(inputs, 0).copy())
            one.most, one.planned = most_drafts, answers[0] if answers else ()
            decoder = SingleDecoder(engine, table, greedy)
            answers.append([token for _, token in decode(decoder, [one])])
        total += 1
        changed += answers[0] != answers[1]
        accepted, drafted = accepted + one.progress.accepted, drafted + one.progress.drafted
    return {"answers": total, "changed": changed, "drafted": drafted, "accepted": accepted}


def main() -> None:
    """Prints one line of JSON for every bundle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="+", type=Path)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--drafts", type=int, default=4, help="tokens drafted for one call")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    given = parser.parse_args()
    for path in given.bundle:
        found = changed_answers(load(path), given.answers, given.drafts, given.tokens)
        print(json.dumps({"bundle": path.name, **found}), flush=True)


if __name__ == "__main__":
    main()
