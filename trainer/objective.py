"""The training objective of a stage: one module that maps a batch to a loss. Wrappers
for several processes thus see a single forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.contract.tokenizer import Tokenizer
from trainer.batch import IGNORE, Batch, block_mask
from trainer.config import STAGES, Stage, StageRun
from trainer.loss import AnswerLoss, DenseHead
from trainer.model import InfMLLM

__all__ = ["Objective", "make_optimiser"]

_BETAS = (0.9, 0.98)


class Objective(nn.Module):
    """The model with its losses. `dense_classes` has the number of classes of each
    per-patch label; it is empty if the data have no such labels.
    """

    _no_split_modules = ("VisionBlock", "DecoderLayer")  # FSDP shards each of these as a unit

    def __init__(
        self, model: InfMLLM, tokenizer: Tokenizer, dense_classes: tuple[int, ...], seed: int
    ) -> None:
        super().__init__()
        self.model = model
        self.dense_head = (
            DenseHead(model.spec.vision.width, dense_classes, torch.Generator().manual_seed(seed))
            if dense_classes
            else None
        )
        self.answer_loss = AnswerLoss(tokenizer, model.spec.decoder.vocab_size)

    def forward(self, batch: Batch, stage: Stage) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar loss of one micro-batch and the figures to log."""
        model, shown = self.model, dict[str, Tensor]()
        with torch.set_grad_enabled(stage.tower > 0 and torch.is_grad_enabled()):
            patches, early = model.vision_tower.with_early_features(batch.pixels)
        total = torch.zeros((), device=patches.device)
        if self.dense_head is not None and batch.dense is not None and stage.uses_dense:
            dense, accuracy = self.dense_head(patches.float(), early.float(), batch.dense)
            total = total + dense * (stage.dense_weight or 1.0)
            shown |= {"dense": dense.detach(), "patch accuracy": accuracy.detach()}
        if stage.objective == "language":
            answer = self._answer(batch, patches)
            total = total + answer
            shown["answer"] = answer.detach()
        return total, shown

    def _answer(self, batch: Batch, patches: Tensor) -> Tensor:
        model = self.model
        images = model.pool_adapter(patches, model.pool_tensor(batch.p))
        embeds = model.decoder.embed_tokens(batch.ids.clamp_min(0))
        embeds = embeds.masked_scatter(
            batch.image_slots[..., None], images.to(embeds.dtype)
        )  # the residual stream stays fp32
        hidden, _ = model.decoder(embeds, batch.positions, block_mask(batch.segments))
        answers = batch.labels != IGNORE
        logits = model.decoder.lm_head(hidden[answers]).float()
        return self.answer_loss(logits, batch.labels[answers], batch.weights[answers])


def make_optimiser(objective: Objective, run: StageRun, fused: bool = True) -> torch.optim.AdamW:
    """Returns AdamW over the parameters that the stage trains, and freezes all others.
    Each parameter group stores its learning-rate factor.
    """
    stage = STAGES[run.stage]
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in objective.model.named_parameters():
        factor = stage.factor(name)
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            decay = run.weight_decay if parameter.ndim > 1 and "embed" not in name else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    if objective.dense_head is not None:
        for parameter in objective.dense_head.parameters():
            parameter.requires_grad_(stage.uses_dense)
            if stage.uses_dense:
                groups.setdefault((1.0, 0.0), []).append(parameter)
    rows = [
        {"params": tensors, "factor": factor, "weight_decay": decay}
        for (factor, decay), tensors in groups.items()
    ]
    return torch.optim.AdamW(rows, lr=run.lr, betas=_BETAS, fused=fused)
