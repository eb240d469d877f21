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
from filelock import FileLock
from PIL import Image

from export.pipeline import BuildOptions, build
from export.schemes import find_scheme
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


def pytest_configure() -> None:
    """Gives each process of `pytest -n` one core: threads of several processes that share
    cores wait for each other for most of the time.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the tests their own cache instead of the user's, and limits PyTorch to two
    threads.
    """
    os.environ["INFMLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that all processes of one `pytest -n` share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """Returns a function: `once(name, make)` is the folder that `make(folder)` writes, in
    whichever process needs it first. Do not change the folder.
    """

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared_folder / name
        if not folder.exists():
            with FileLock(shared_folder / f"{name}.lock"):
                if not folder.exists():
                    unfinished = shared_folder / f"{name}.unfinished"
                    make(unfinished)
                    unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def built_for(
    tiny_checkpoint: Path, once: Callable[[str, Callable[[Path], None]], Path]
) -> Callable[[str, str], Path]:
    """Returns a function: `built_for(target, scheme)` is the tiny checkpoint's bundle
    for that target and scheme, built once. Do not change the bundle.
    """

    def get(target: str, scheme: str) -> Path:
        def make(folder: Path) -> None:
            build(BuildOptions(tiny_checkpoint, find_scheme(scheme, target), target, folder))

        return once(f"{target}-{scheme}", make)

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
