"""8-bit layers turn what is not finite into numbers; the GPU engines notice all the
same, whatever chooses the token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.parity.cpu_reference import reference_session
from runtime import Decoding, Session, load
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import NonFiniteError
from runtime.generation import request as requests
from runtime.generation.token_embeddings import embed_prompt
from tests.runtime.conftest import Install

CHOICES = [Decoding(lookup=0), Decoding(temperature=1.0), Decoding(beams=2)]


@pytest.fixture(params=["tensorrt", "cuda"])
def session(
    request: pytest.FixtureRequest,
    built_tensorrt: Callable[[str], Path],
    built_for: Callable[[str, str], Path],
    gpu: Install,
) -> Session:
    if request.param == "cuda":
        return reference_session(read_bundle(built_for("cuda", "int8")))
    gpu()
    return load(built_tensorrt("int8"))


def test_rows_that_overflow_give_no_token(session: Session, scene_image: Image.Image) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "embed_prompt", lambda *parts: embed_prompt(*parts) * 1e6)
        for decoding in CHOICES:
            session.clear_caches()
            with pytest.raises(NonFiniteError):
                session.ask(scene_image, "tell me all about every single thing", decoding=decoding)
    session.clear_caches()
    assert session.ask(scene_image, "describe", max_new_tokens=4).tokens


def test_a_spoilt_row_before_the_last_is_noticed(session: Session) -> None:
    rows = np.ones((1, 4, 64), np.float32)
    rows[0, 1] = np.nan
    assert np.isnan(session.engine.forward(rows, 0)).all()
    assert np.isfinite(session.engine.forward(np.ones((1, 4, 64), np.float32), 0)).all(), (
        "nothing of it is left"
    )
    with pytest.raises(NonFiniteError):
        session.engine.greedy(np.full((1, 1, 64), np.inf, np.float32), 4)


def test_pictures_that_come_out_as_nan_are_refused(
    session: Session, scene_image: Image.Image
) -> None:
    see = session.engine.embed_image
    session.engine.embed_image = lambda *given: see(*given) * np.float32(np.nan)
    for decoding in CHOICES:
        with pytest.raises(
            NonFiniteError, match="the vision graph produced NaN or infinite embeddings"
        ):
            session.ask(scene_image, "describe", decoding=decoding)


def test_of_sequences_side_by_side_the_spoilt_one_shows(session: Session) -> None:
    session.engine.forward(np.ones((1, 4, 64), np.float32), 0)
    batch = session.engine.batch(2, 16)
    batch.fill(0, 4)
    batch.fill(1, 4)
    rows = np.ones((2, 1, 64), np.float32)
    assert np.isfinite(batch.step(rows, np.array([4, 4], np.int32))).all()
    rows[1] = np.nan
    assert np.isnan(batch.step(rows, np.array([5, 5], np.int32))[1]).all()
