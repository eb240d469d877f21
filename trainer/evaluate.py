"""Answers questions with a PyTorch checkpoint, for `infmllm-eval CKPT DATA` and for the
scores in a checkpoint's card.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from runtime.contract.errors import ContextError
from runtime.contract.image import to_pixels
from runtime.contract.prompt import TASKS
from runtime.data.sample import Sample
from trainer.checkpoint import Checkpoint, load_checkpoint

__all__ = ["CheckpointAnswerer"]


class CheckpointAnswerer:
    """Answers greedily with a checkpoint in fp32 (on the CPU unless the model was
    moved). The last image's embeddings are kept for further questions about it.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint or load_checkpoint(path)
        self._last: tuple[Image.Image, int, Tensor] | None = None

    @torch.no_grad()
    def answer_ids(
        self, image: Image.Image, sample: Sample, visual_tokens: int | None
    ) -> list[int]:
        """Returns the token ids of the greedy answer, up to the task's published limit.
        Raises `ContextError` if the prompt is too long.
        """
        model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        p = model.spec.pool_size_for(visual_tokens)
        if self._last is None or self._last[0] is not image or self._last[1] != p:
            pixels = torch.from_numpy(to_pixels(image, model.spec)).to(
                model.decoder.embed_tokens.weight.device
            )
            self._last = (image, p, model.embed_image(pixels, p)[0])
        before, after = tokenizer.encode_prompt(sample.prompt())
        total = len(before) + len(after) + p * p
        if total > model.spec.decoder.context:
            raise ContextError(
                f"the prompt takes {total} positions, the model's context has "
                f"{model.spec.decoder.context}; shorten it"
            )
        return model.generate(
            model.sequence(before, self._last[2], after), TASKS[sample.task].max_new_tokens
        )

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        """Returns the text of the greedy answer."""
        return self.checkpoint.tokenizer.decode(
            self.answer_ids(image, sample, visual_tokens)
        ).strip()
