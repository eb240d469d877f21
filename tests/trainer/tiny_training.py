"""Helpers shared by `test_training.py` and `test_training_runs.py`."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from trainer.model import InfMLLM


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer(RawTokenizer.from_str(tokenizer_json), TINY)


def tiny_model(seed: int = 0) -> InfMLLM:
    return InfMLLM(TINY, torch.Generator().manual_seed(seed))
