"""The parity gate: golden results from PyTorch, and the verdict on a compiled bundle that replays them.

Goldens are made by the uncached PyTorch model in fp32, so a cached, quantised, lowered bundle is held against the simplest form of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from runtime.contract.errors import BundleError, ParityError
from runtime.contract.image import to_pixels
from runtime.contract.prompt import Prompt, render
from runtime.contract.sample import Example
from runtime.contract.tokenizer import Tokenizer
from runtime.selftest import Golden, StageError, replay, replay_goldens
from runtime.session import Session
from trainer.checkpoint import Checkpoint
from trainer.datasets.scene_text import ground_sample, vqa_sample
from trainer.datasets.scenes import draw_scene
from trainer.model import InfMLLM

__all__ = ["DECODE_STEPS", "compare_with_checkpoint", "gate", "make_goldens", "verdict_json"]

DECODE_STEPS = 16
_CASES = 6
_SEED, _FRESH_SEED = 20231, 20232


@torch.no_grad()
def make_goldens(model: InfMLLM, tokenizer: Tokenizer, cases: int = _CASES, seed: int = _SEED, examples: Sequence[Example] = ()) -> list[Golden]:
    """Pictures with prompts of the short tasks and every pool size in turn; up to 16 greedy steps each.

    They come from `examples`, which should be of the kind the model was trained on, or else are synthetic scenes.

    A case ends with the answer: what a trained model computes after its end-of-sequence token is noise that no user sees, and amplifies errors.
    """
    rng = np.random.default_rng(seed)
    goldens = []
    for index in range(cases):
        image, prompts = _case(examples, index, rng)
        before, after = tokenizer.encode_prompt(prompts[index % len(prompts)])
        p = model.spec.pool_sizes[index % len(model.spec.pool_sizes)]
        pixels = to_pixels(image, model.spec)
        embeds = model.embed_image(torch.from_numpy(pixels), p)[0]
        sequence = model.sequence(before, embeds, after)
        tokens: list[int] = []
        logits = [model.logits(sequence)[0, -1]]
        for _ in range(DECODE_STEPS):
            token = int(logits[-1].argmax())
            if tokens and token == model.spec.eos_id:
                break
            tokens.append(token)
            sequence = torch.cat([sequence, model.decoder.embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
            logits.append(model.logits(sequence)[0, -1])
        arrays = [np.asarray(ids, np.int64) for ids in (before, after)]
        goldens.append(
            Golden(pixels, p, arrays[0], arrays[1], embeds.numpy(), logits[0].numpy(), np.asarray(tokens, np.int64), torch.stack(logits[1:]).numpy())
        )
    return goldens


def _case(examples: Sequence[Example], index: int, rng: np.random.Generator) -> tuple[Image.Image, list[Prompt]]:
    """A picture and a prompt for each of its tasks."""
    if examples:
        image, samples = examples[int(rng.integers(len(examples)))].load()
        by_task = {samples[int(i)].task: samples[int(i)] for i in rng.permutation(len(samples))}
        return image, [by_task[task].prompt() for task in sorted(by_task)]
    scene = draw_scene(rng)
    phrase = ground_sample(scene, rng)
    return scene.image, [render("caption", "describe"), vqa_sample(scene, rng).prompt(), phrase.prompt() if phrase else render("ground", "circle")]


def gate(session: Session, tolerance: dict[str, float]) -> list[StageError]:
    """Replays a bundle's goldens; raises `ParityError` naming the worst stage if any is out of tolerance."""
    stages = replay(session, tolerance)
    failed = [stage for stage in stages if not stage.passed]
    if failed:
        worst = max(failed, key=lambda stage: stage.error / stage.tolerance)
        raise ParityError(
            f"{worst.stage} differs from PyTorch by {worst.error:.3g} (relative RMS), the scheme allows {worst.tolerance:.3g}; nothing was written. "
            "Try --calib with pictures of the kind the model was trained on, or a higher --precision; --allow-unverified keeps it, marked"
        )
    return stages


def compare_with_checkpoint(session: Session, checkpoint: Checkpoint, cases: int, examples: Sequence[Example] = ()) -> list[StageError]:
    """Errors of a bundle against a checkpoint on cases the bundle does not carry. Raises `BundleError` if they do not belong together."""
    built_from = session.bundle.provenance.get("checkpoint_sha256")
    if built_from != checkpoint.sha256:
        raise BundleError(
            f"{session.bundle.path} was built from checkpoint {str(built_from)[:12]}…, "
            f"{checkpoint.path} is {checkpoint.sha256[:12]}…; name the checkpoint it was built from"
        )
    goldens = make_goldens(checkpoint.model, checkpoint.tokenizer, cases, _FRESH_SEED, examples)
    return replay_goldens(session, goldens, session.bundle.tolerance)


def verdict_json(verdict: str, stages: Sequence[StageError], tolerance: dict[str, float]) -> dict[str, Any]:
    """The manifest's parity entry."""
    rows = [{"stage": s.stage, "error": s.error, "tolerance": s.tolerance, "agreement": s.agreement} for s in stages]
    return {"verdict": verdict, "decode_steps": DECODE_STEPS, "tolerance": tolerance, "stages": rows}
