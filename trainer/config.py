"""Defines presets (model shapes), stages (what training updates) and recipes (sequences
of stages).

To add one, add a row to the table `PRESETS`, `STAGES` or `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.contract.errors import UsageError
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec

__all__ = [
    "DECAYS",
    "PRESETS",
    "RECIPES",
    "STAGES",
    "Preset",
    "Stage",
    "StageRun",
    "changed",
    "find_preset",
    "find_recipe",
]


@dataclass(frozen=True)
class Stage:
    """The parts that one stage trains. `tower`, `adapter` and `decoder` are
    learning-rate factors of these parts; 0 freezes a part.

    `decoder_part` is "all" for all decoder weights, or "qv" for the Q and V projections
    only.
    """

    name: str
    tower: float
    adapter: float
    decoder: float
    decoder_part: str = "all"
    objective: str = "language"
    dense_weight: float = 0.0

    @property
    def uses_dense(self) -> bool:
        """Whether per-patch labels are part of the objective."""
        return self.objective == "dense" or self.dense_weight > 0

    def factor(self, parameter: str) -> float:
        """Returns the learning-rate factor of a named parameter of `InfMLLM`; 0 means
        frozen.
        """
        if parameter.startswith("vision_tower."):
            return self.tower
        if parameter.startswith("pool_adapter."):
            return self.adapter
        if (
            self.decoder_part == "qv"
            and ".self_attn.q_proj." not in parameter
            and ".self_attn.v_proj." not in parameter
        ):
            return 0.0
        return self.decoder


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        # Stages for models without pretrained parts. They are this project's, not the paper's.
        Stage("dense", tower=1.0, adapter=0.0, decoder=0.0, objective="dense"),
        Stage("scratch", tower=0.0, adapter=1.0, decoder=1.0),
        Stage("joint", tower=0.3, adapter=1.0, decoder=1.0, dense_weight=0.3),
        # The three published stages (arXiv 2311.06791).
        Stage("alignment", tower=0.0, adapter=1.0, decoder=0.0),
        Stage("multitask", tower=1.0, adapter=1.0, decoder=1.0, decoder_part="qv"),
        Stage("instruction", tower=0.0, adapter=1.0, decoder=1.0),
    )
}


DECAYS = ("cosine", "linear")


@dataclass(frozen=True)
class StageRun:
    """One stage of a recipe: its length in optimiser steps and its learning-rate
    schedule. Each process contributes `batch` images per micro-batch and `accumulate`
    micro-batches per step.
    """

    stage: str
    steps: int
    batch: int
    lr: float
    warmup: int = 50
    floor: float = 0.05
    weight_decay: float = 0.05
    chat_share: float = 0.0
    decay: str = "cosine"
    accumulate: int = 1


RECIPES: dict[str, tuple[StageRun, ...]] = {
    # Adapts a trained small model to other images by training all parts. The data must have
    # per-patch labels (scenes or boxes).
    "adapt": (
        StageRun("dense", steps=600, batch=16, lr=1.5e-3),
        StageRun("joint", steps=1050, batch=16, lr=1.2e-3),
    ),
    # The three published stages, for models with pretrained parts. The paper gives no lengths and
    # learning rates, so these values are this project's.
    "published": (
        StageRun("alignment", steps=2000, batch=16, lr=1e-3, warmup=100),
        StageRun("multitask", steps=8000, batch=16, lr=1e-4, warmup=500),
        StageRun("instruction", steps=2000, batch=16, lr=2e-5, warmup=100, chat_share=0.5),
    ),
}


@dataclass(frozen=True)
class Preset:
    """A named model shape and the recipe that trains it. The recipe is empty if the
    weights come from elsewhere.
    """

    spec: ModelSpec
    recipe: tuple[StageRun, ...] = ()


_NANO_VOCABULARY = 960  # the built tokenizer's size, rounded up to a multiple of 64

PRESETS: dict[str, Preset] = {
    "nano": Preset(
        ModelSpec(
            name="nano",
            vision=VisionSpec(
                image_size=128, patch_size=16, width=160, layers=6, heads=5, mlp_width=640
            ),
            decoder=DecoderSpec(
                vocab_size=_NANO_VOCABULARY,
                hidden=192,
                layers=4,
                heads=6,
                kv_heads=6,
                mlp_width=512,
                context=512,
            ),
            pool_sizes=(8, 4),
        ),
        (
            # Takes 75 minutes with two processes of one core each. With one process, use
            # --accumulate 2.
            StageRun("dense", steps=1200, batch=16, lr=1.5e-3),
            StageRun("scratch", steps=259, batch=16, lr=1.2e-3, floor=1.0),
            StageRun("joint", steps=1500, batch=16, lr=1.2e-3, chat_share=0.08),
            StageRun(
                "joint", steps=2000, batch=16, lr=1.2e-3, chat_share=0.08
            ),  # second warm-up and decay: the model learns relations only here
        ),
    ),
    "edge": Preset(
        ModelSpec(
            name="edge",
            vision=VisionSpec(
                image_size=448, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096
            ),
            decoder=DecoderSpec(
                vocab_size=32000,
                hidden=2048,
                layers=22,
                heads=32,
                kv_heads=4,
                mlp_width=5632,
                context=2048,
            ),
            pool_sizes=(16, 8, 32),
        )
    ),
    "7b": Preset(
        ModelSpec(
            name="7b",
            vision=VisionSpec(
                image_size=448, patch_size=14, width=1408, layers=39, heads=16, mlp_width=6144
            ),
            decoder=DecoderSpec(
                vocab_size=32000,
                hidden=4096,
                layers=32,
                heads=32,
                kv_heads=32,
                mlp_width=11008,
                context=4096,
            ),
            pool_sizes=(16, 32, 8),
        )
    ),
}


def find_preset(name: str) -> Preset:
    """Returns the preset with that name. Raises `UsageError` that lists the choices."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def find_recipe(preset: Preset, text: str) -> tuple[StageRun, ...]:
    """Returns the stage runs of `all` (the preset's own recipe), of a named recipe, or
    of stages separated by commas. Raises `UsageError`.
    """
    if text == "all":
        if not preset.recipe:
            raise UsageError(
                f"preset {preset.spec.name} has no recipe for --stage all; choose another "
                f"({', '.join([*RECIPES, *STAGES])})"
            )
        return preset.recipe
    if text in RECIPES:
        return RECIPES[text]
    known = {name: StageRun(name, steps=500, batch=16, lr=3e-4) for name in STAGES}
    known |= {run.stage: run for recipe in (*RECIPES.values(), preset.recipe) for run in recipe}
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise UsageError(
            f"unknown stage {unknown[0]!r}; choose all, one of the recipes {', '.join(RECIPES)}, "
            f"or one or more of the stages {', '.join(STAGES)}"
        )
    return tuple(known[name] for name in names)


def changed(recipe: Sequence[StageRun], changes: Mapping[str, Any]) -> tuple[StageRun, ...]:
    """Returns the stage runs with a user's changes applied; None leaves a value
    unchanged. If `steps` changes, the warm-up is limited to a fifth of the steps.
    Raises `UsageError`.
    """
    wanted = {key: value for key, value in changes.items() if value is not None}
    if wanted.get("decay", DECAYS[0]) not in DECAYS:
        raise UsageError(f"unknown decay {wanted['decay']!r}; choose one of: {', '.join(DECAYS)}")
    runs = [replace(run, **wanted) for run in recipe]
    return tuple(
        replace(run, warmup=min(run.warmup, max(1, run.steps // 5))) if "steps" in wanted else run
        for run in runs
    )
