"""The two training losses: next-token prediction on answers, and per-patch labels.

A coordinate token that is off by one hundredth is nearly right. Its target is therefore
a narrow Gaussian over neighbouring coordinates; every other token has the usual one-hot
target.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.contract.tokenizer import Tokenizer
from trainer.batch import IGNORE
from trainer.datasets.detection import DENSE_SUB

__all__ = ["AnswerLoss", "DenseHead"]

_COORDINATE = re.compile(r"([ ,]?)([01]\.\d\d)")
_SIGMA = 0.012  # as a fraction of the image's side
_CLASS_WEIGHT = 3.0  # of all class labels together, relative to box and outline
_MAX_RARITY = 4.0


class AnswerLoss(nn.Module):
    """Weighted mean cross-entropy over answer tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__()
        matches = [
            (i, m)
            for i in range(tokenizer.vocab_size)
            if (m := _COORDINATE.fullmatch(tokenizer.decode([i])))
        ]
        self.row_of: Tensor
        self.targets: Tensor
        self.register_buffer(
            "row_of", torch.full((vocab_size,), -1, dtype=torch.long), persistent=False
        )
        self.register_buffer("targets", torch.zeros(len(matches), vocab_size), persistent=False)
        if matches:
            ids = torch.tensor([i for i, _ in matches])
            values = torch.tensor([float(m[2]) for _, m in matches])
            prefixes = torch.tensor([" ,".find(m[1]) if m[1] else 9 for _, m in matches])
            bell = torch.exp(-0.5 * ((values[:, None] - values[None]) / _SIGMA) ** 2) * (
                prefixes[:, None] == prefixes[None]
            )
            self.targets[:, ids] = bell / bell.sum(1, keepdim=True)
            self.row_of[ids] = torch.arange(len(matches))

    def forward(self, logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
        """Returns the scalar loss of logits [N, V] for label ids [N] with weights [N].
        No label may be `IGNORE`.
        """
        assert bool((labels_N != IGNORE).all()), "gather answer positions before computing logits"
        rows = self.row_of[labels_N]
        plain, ordered = rows < 0, rows >= 0
        total = (
            F.cross_entropy(logits_NV[plain], labels_N[plain], reduction="none") * weights_N[plain]
        ).sum()
        if bool(ordered.any()):
            losses = F.cross_entropy(
                logits_NV[ordered], self.targets[rows[ordered]], reduction="none"
            )
            total = total + (losses * weights_N[ordered]).sum()
        return total / weights_N.sum()


def _rarity(target: Tensor, classes: int) -> Tensor:
    """Returns a weight per patch: the square root of the mean class count over the
    count of the patch's class, at most 4. Class 0 (nothing) has weight 1.
    """
    counts = torch.bincount(target.flatten(), minlength=classes).float()
    things = counts[1:]
    rarity = (
        (things.sum() / (things > 0).sum().clamp_min(1) / things.clamp_min(1))
        .sqrt()
        .clamp_max(_MAX_RARITY)
    )
    return torch.cat([torch.ones_like(counts[:1]), rarity])[target]


class DenseHead(nn.Module):
    """Linear heads that predict classes, box and outline per patch. They are used only
    to train the vision tower and are not saved in checkpoints.

    `classes` has the number of classes of each label, such as colour, shape and size;
    class 0 is nothing.

    The outline (which cells of a patch a thing covers) is also predicted from an early
    block. Outlines are local, and later blocks need them to tell shapes apart. This
    early loss ends the long plateau at chance accuracy on shapes.
    """

    def __init__(self, width: int, classes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self._parts = (*classes, 4, DENSE_SUB**2)
        self.linear = nn.Linear(width, sum(self._parts))
        self.early = nn.Linear(width, DENSE_SUB**2)
        with torch.no_grad():
            for layer in (self.linear, self.early):
                layer.weight.normal_(0.0, width**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(
        self, patches_NPC: Tensor, early_NPC: Tensor, labels_NPD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the scalar loss and the share of covered patches whose classes are
        all right.
        """
        count = len(self._parts) - 2
        *classes, box, outline = self.linear(patches_NPC).split(self._parts, dim=-1)
        covered = labels_NPD[..., 0] > 0
        weight = torch.where(covered, 1.0, 0.3)
        total = torch.zeros((), device=patches_NPC.device)
        right = covered.clone()
        for index, scores in enumerate(classes):
            target = labels_NPD[..., index].long()
            losses = F.cross_entropy(
                scores.flatten(0, 1), target.flatten(), reduction="none"
            ).view_as(weight)
            balanced = weight * _rarity(target, scores.shape[-1])
            total = total + _CLASS_WEIGHT / count * (losses * balanced).sum() / balanced.sum()
            right &= scores.argmax(-1) == target
        if bool(covered.any()):
            total = total + 10 * F.smooth_l1_loss(
                box[covered], labels_NPD[..., count : count + 4][covered], beta=0.05
            )
        cells = labels_NPD[..., count + 4 :]
        for logits in (outline, self.early(early_NPC)):
            total = total + 2 * F.binary_cross_entropy_with_logits(logits, cells)
        return total, right.sum() / covered.sum().clamp_min(1)
