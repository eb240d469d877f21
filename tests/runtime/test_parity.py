"""Stages of a replay are compared as softmax sees them, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.contract.goldens import Golden
from runtime.parity import StageError, stage_errors

VOCABULARY, STEPS = 50, 4
TOLERANCE = {"vision": 0.1, "prefill": 0.1, "decode": 0.1}


@pytest.fixture
def golden() -> Golden:
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(rng.normal(size=shape), np.float32)

    prefill, steps = draw(VOCABULARY), draw(STEPS, VOCABULARY)
    steps[0, 7] = 6.0  # PyTorch is sure of this token
    steps[1, [3, 4]] = 4.0, 4.001  # and does not care which of these it is
    ids = np.array([1, 2], np.int64)
    return Golden(draw(1, 3, 4, 4), 2, ids, ids, draw(4, 8), prefill, np.arange(STEPS), steps)


def decode(golden: Golden, steps: np.ndarray) -> StageError:
    results = [(golden.image_embeds, golden.prefill, steps)]
    return stage_errors([golden], results, TOLERANCE)[2]


def test_the_common_offset_of_logits_counts_nothing(golden: Golden) -> None:
    offsets = np.array([[100.0], [-50.0], [3.0], [0.0]], np.float32)
    stage = decode(golden, golden.steps + offsets)
    assert stage.passed and stage.error < 1e-5 and stage.agreement == 1.0
    assert stage.divergence == pytest.approx(0, abs=1e-6)


def test_an_offset_cannot_hide_an_error(golden: Golden) -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=golden.steps.shape).astype(np.float32)
    large = np.float32(100)
    hidden = decode(
        Golden(**{**vars(golden), "steps": golden.steps + large}), golden.steps + large + noise
    )
    assert not hidden.passed and hidden.error > 0.3
    assert hidden.divergence is not None and hidden.divergence > 0.05


def test_a_token_may_change_only_where_pytorch_is_unsure(golden: Golden) -> None:
    steps = golden.steps.copy()
    steps[1, 3] += np.float32(0.01)
    stage = decode(golden, steps)
    assert stage.passed and stage.flips == 0 and stage.agreement == 0.75
    steps[0, 8] = 6.1  # near the sure token in relative error, and yet another answer
    wrong = decode(golden, steps)
    assert wrong.flips == 1 and not wrong.passed


def test_an_error_on_the_likely_tokens_alone_diverges() -> None:
    """Small beside the norm of a row, yet half of the probability goes elsewhere. The bound
    is the divergence of evenly spread noise of the tolerance's size.
    """
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(STEPS, 4000)).astype(np.float32)
    rows[:, 5], rows[:, 6] = 14.0, 13.0
    ids = np.array([1], np.int64)
    image, steps = rows[:1, :8], np.arange(STEPS)
    golden = Golden(image, 2, ids, ids, image, rows[0], steps, rows)
    noise = 0.099 * rows.std(-1, keepdims=True) * rng.normal(size=rows.shape).astype(np.float32)
    even = decode(golden, rows + noise)
    assert even.passed and even.divergence is not None
    wrong = rows.copy()
    wrong[:, 5] -= 0.9
    stage = decode(golden, wrong)
    assert stage.error <= stage.tolerance and not stage.flips and stage.agreement == 1.0
    assert stage.diverges and not stage.passed
    logs = [torch.from_numpy(values).log_softmax(-1) for values in (rows, wrong)]
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert stage.divergence == pytest.approx(float(expected), rel=1e-4)


def test_results_that_are_not_numbers_fail(golden: Golden) -> None:
    steps = golden.steps.copy()
    steps[2, 2] = np.nan
    assert not decode(golden, steps).passed
