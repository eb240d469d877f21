"""Small real fixtures shared by the tests: a two-layer model with grouped-query
attention, its checkpoint, and bundles that are built from it once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.pipeline import BuildOptions, build
from export.schemes import TARGET_SCHEMES
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec
from trainer.checkpoint import save_checkpoint
from trainer.datasets.scene_text import corpus
from trainer.datasets.scenes import draw_scene
from trainer.model import InfMLLM
from trainer.tokenize import build_tokenizer

TINY = ModelSpec(
    name="tiny",
    vision=VisionSpec(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_width=64),
    decoder=DecoderSpec(
        vocab_size=960, hidden=64, layers=2, heads=4, kv_heads=2, mlp_width=96, context=128
    ),
    pool_sizes=(4, 2),
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the tests their own cache instead of the user's, and limits PyTorch to two
    threads.
    """
    os.environ["INFMLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(2)
    yield


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return build_tokenizer(corpus()).to_str()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(
        path,
        InfMLLM(TINY, torch.Generator().manual_seed(5)),
        tokenizer_json,
        {"recipe": "random", "data": [{"name": "synthetic"}]},
    )
    return path


@pytest.fixture(scope="session")
def built_for(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Returns a function: `built_for(target, scheme)` is the tiny checkpoint's bundle
    for that target and scheme, built once. Do not change the bundle.
    """
    done: dict[tuple[str, str], Path] = {}

    def get(target: str, scheme: str) -> Path:
        if (target, scheme) not in done:
            out = tmp_path_factory.mktemp("bundle") / scheme
            build(
                BuildOptions(tiny_checkpoint, TARGET_SCHEMES[target].schemes[scheme], target, out)
            )
            done[target, scheme] = out
        return done[target, scheme]

    return get


@pytest.fixture(scope="session")
def built(built_for: Callable[[str, str], Path]) -> Callable[[str], Path]:
    """Returns a function: `built(scheme)` is the CPU bundle of that scheme. Use
    `copied` for a bundle to change.
    """
    return lambda scheme: built_for("cpu", scheme)


@pytest.fixture
def copied(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """Returns a private copy of the fp32 bundle that a test may damage."""
    return Path(shutil.copytree(built("fp32"), tmp_path / "bundle"))


@pytest.fixture(scope="session")
def scene_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    draw_scene(np.random.default_rng(3)).image.save(path)
    return path


@pytest.fixture(scope="session")
def scene_image(scene_png: Path) -> Image.Image:
    return Image.open(scene_png).convert("RGB")
