"""`--precision auto`: finds the cheapest mixture of schemes per block that keeps the
answers, by measurement.

The sensitivity of each block to each candidate is measured separately. A path of
upgrades starts at the cheapest mixture. Each upgrade on it saves the most divergence
per added cost. Bisection over the path finds the first mixture whose measured answers
lose no more than allowed. Uniform schemes are measured too, so the table shows the gain
from mixing.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.blocks import Block, StreamedModel
from calibration.calibrate import Calibrated, calibrate
from calibration.linear import LinearScheme
from calibration.parts import AUTO, CALIBRATION, SENSITIVITY, Part
from calibration.samples import MIN_IMAGES, Case, draw_cases, draw_examples
from calibration.sensitivity import sensitivities
from export.pipeline import build
from export.planning.plan import linear_bytes, linears, part_bytes
from export.schemes import DECODER, SCHEMES, Scheme
from export.state import BuildOptions, Detail, open_build
from runtime.contract.bundle import VERIFIED
from runtime.contract.errors import ParityError, UsageError
from runtime.data.bad_rows import Faults
from runtime.data.sample import Example
from runtime.evaluation.cli import BundleAnswerer
from runtime.evaluation.evaluate import Answerer, evaluate
from trainer.checkpoint import StoredCheckpoint, load_checkpoint
from trainer.evaluate import CheckpointAnswerer

__all__ = ["CANDIDATES", "METRICS", "Budget", "Mixture", "choose_mixture", "upgrade_path"]

MEAN = "mean"
SAME = "same"
METRICS = (MEAN, "caption", "vqa", "ground", "chat", SAME)
"""The metrics that a budget can limit: accuracy over all tasks or of one task, or the
share of answers identical to PyTorch's. That share detects far smaller changes.
"""

_SENSITIVITY_CASES = 16
_UNIFORM = ("int8", "int4-all")
CANDIDATES: Mapping[str, Mapping[str, LinearScheme]] = {
    # Blocks of 128 inputs are smaller and faster, blocks of 32 are more accurate.
    "vision": {
        "int4/128": LinearScheme("int4", block=128, rounding="gptq", smooth=True),
        "int4/32": LinearScheme("int4", block=32, rounding="gptq", smooth=True),
        "int8": LinearScheme("int8", "int8-row", smooth=True),
        "fp16": LinearScheme("fp16"),
    },
    "decoder": {
        "int4/128": LinearScheme("int4", block=128, rounding="gptq", smooth=True),
        "int4/32": LinearScheme("int4", block=32, rounding="gptq", smooth=True),
        "int8": LinearScheme("int8", "int8-tensor", smooth=True),
        "fp16": LinearScheme("fp16"),
    },
}
"""The schemes that a block may use, the cheapest first."""

Choice = dict[str, str]
"""Maps the name of a block to the name of its candidate."""


@dataclass(frozen=True)
class Budget:
    """The points of a metric that may be lost, measured on questions about `images`
    images.
    """

    max_drop: float = 0.5
    metric: str = MEAN
    pictures: int = 150

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"unknown metric {self.metric!r}; choose one of: {', '.join(METRICS)}")
        if self.max_drop < 0:
            raise UsageError(f"--max-drop is {self.max_drop}, expected 0 or more points")


@dataclass(frozen=True)
class Mixture:
    """A row of the table: graph bytes, predicted divergence in nats (None for uniform
    schemes), accuracy per task in percent, and points lost.

    `scores` also contains "same", the share of answers equal to PyTorch's.
    """

    name: str
    scheme: Scheme
    bytes: int
    predicted: float | None = None
    scores: Mapping[str, float] | None = None
    drop: float | None = None
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        row = {
            "name": self.name,
            "bytes": self.bytes,
            "predicted_nats": self.predicted,
            "scores": self.scores,
            "drop": self.drop,
            "chosen": self.chosen,
        }
        return row | {
            "linears": {
                prefix or "rest": linear.text() for prefix, linear in self.scheme.parts.items()
            }
        }


def _table(block: Block) -> Mapping[str, LinearScheme]:
    return CANDIDATES["decoder" if block.name.startswith(DECODER) else "vision"]


def upgrade_path(
    nats: Mapping[str, Mapping[str, float]], cost: Mapping[str, Mapping[str, float]]
) -> list[Choice]:
    """Returns mixtures from the cheapest to the most accurate. Each differs from the
    one before by the upgrade that saves the most divergence per added cost.
    """
    choice = {
        block: min(row, key=lambda name: (cost[block][name], nats[block][name]))
        for block, row in nats.items()
    }
    path = [dict(choice)]
    while True:
        steps = []
        for block, current in choice.items():
            for name, value in nats[block].items():
                saved, added = (
                    nats[block][current] - value,
                    cost[block][name] - cost[block][current],
                )
                if saved > 0:
                    steps.append((saved / max(added, 1e-12), block, name))
        if not steps:
            return path
        _, block, name = max(steps)
        choice[block] = name
        path.append(dict(choice))


def choose_mixture(
    options: BuildOptions, budget: Budget, detail: Detail = lambda done, total, text: None
) -> tuple[Scheme, list[Mixture]]:
    """Returns the cheapest mixture within the budget, and all measured mixtures,
    cheapest first. Raises `ParityError` if no mixture keeps the budget.
    """
    uniform = SCHEMES["int4-all"]
    kept = {
        prefix: linear
        for prefix, linear in options.scheme.parts.items()
        if prefix not in uniform.parts
    }  # blocks that --keep names
    drop = uniform.drop if budget.metric == SAME else max(uniform.drop, budget.max_drop)
    base = replace(options.scheme, name="auto", parts={}, drop=drop)
    state = open_build(replace(options, scheme=SCHEMES["int4"]))
    checkpoint = state.checkpoint
    blocks = {
        block.name: block
        for block in StreamedModel(checkpoint.spec, checkpoint.read).blocks()
        if block.feeds
    }
    with tempfile.TemporaryDirectory(prefix="infmllm-auto-") as folder:
        nats = _measure_blocks(checkpoint, state.source, options.samples, Path(folder), detail)
        shapes = linears(checkpoint.spec)
        cost = {
            name: {
                kind: float(
                    sum(
                        linear_bytes(*shapes[f"{x}.weight"], s)
                        for feed in block.feeds
                        for x in feed.linears
                    )
                )
                for kind, s in _table(block).items()
            }
            for name, block in blocks.items()
        }
        path = upgrade_path(nats, cost)
        meter = _Meter(
            checkpoint,
            draw_examples(state.source, budget.pictures, AUTO),
            options,
            budget,
            Path(folder),
            detail,
        )
        rows = [
            meter.measure(Mixture(name, SCHEMES[name], _total(checkpoint, SCHEMES[name])))
            for name in _UNIFORM
        ]

        def mixture(position: int) -> Mixture:
            choice = path[position]
            parts = {
                f"{x}.weight": _table(blocks[name])[kind]
                for name, kind in choice.items()
                for feed in blocks[name].feeds
                for x in feed.linears
            }
            scheme = replace(base, parts={**parts, **kept})
            predicted = sum(nats[name][kind] for name, kind in choice.items())
            return meter.measure(
                Mixture(_summary(choice), scheme, _total(checkpoint, scheme), predicted)
            )

        found, best = _search_path(mixture, len(path), budget)
    rows += [replace(row, chosen=position == best) for position, row in found.items()]
    return found[best].scheme, sorted(rows, key=lambda row: row.bytes)


def _search_path(
    mixture: Callable[[int], Mixture], length: int, budget: Budget
) -> tuple[dict[int, Mixture], int]:
    """Searches a path of mixtures, cheapest first, by bisection. Returns the measured
    mixtures by position, and the position of the cheapest within the budget. Raises
    `ParityError` if not even the most exact one is.
    """
    found = {0: mixture(0)}
    if _loss_of(found[0]) <= budget.max_drop:
        return found, 0
    low, high = 0, length - 1
    found[high] = mixture(high)
    if _loss_of(found[high]) > budget.max_drop:
        raise ParityError(
            f"no combination of precisions loses at most {budget.max_drop} points of "
            f"{budget.metric}: the best loses {_loss_of(found[high]):.2f}; raise --max-drop"
        )
    while high - low > 1:
        middle = (low + high) // 2
        found[middle] = mixture(middle)
        low, high = (low, middle) if _loss_of(found[middle]) <= budget.max_drop else (middle, high)
    return found, high


def _measure_blocks(
    checkpoint: StoredCheckpoint, source: str, samples: int, folder: Path, detail: Detail
) -> dict[str, dict[str, float]]:
    """Returns the divergence in nats of every block and candidate."""

    def draw(count: int, part: Part, least: int) -> list[Case]:
        examples = draw_examples(source, count, part, least)
        return draw_cases(examples, checkpoint.spec, checkpoint.tokenizer, part.seed)

    model = StreamedModel(checkpoint.spec, checkpoint.read)

    def wanted(name: str) -> Sequence[LinearScheme]:
        return [
            s
            for s in CANDIDATES["decoder" if name.startswith(DECODER) else "vision"].values()
            if s.quantised
        ]

    total = len(model.blocks())
    calibrate(
        model,
        [],
        draw(samples, CALIBRATION, MIN_IMAGES),
        wanted,
        folder / "blocks",
        progress=lambda b: detail(0, total, f"calibrating {b.name}"),
    )
    cases = draw(_SENSITIVITY_CASES, SENSITIVITY, 1)
    return sensitivities(
        model, Calibrated(checkpoint.read, folder / "blocks"), cases, _table, detail
    )


@dataclass
class _Meter:
    """Builds mixtures in a scratch folder and asks them the same questions as PyTorch,
    whose answers are computed once.
    """

    checkpoint: StoredCheckpoint
    examples: Sequence[Example]
    options: BuildOptions
    budget: Budget
    folder: Path
    detail: Detail
    reference: Mapping[str, float] | None = None
    answers: Sequence[str] = ()
    built: int = 0

    def measure(self, mixture: Mixture) -> Mixture:
        self.detail(self.built, self.built + 1, f"measuring {mixture.name}")
        if self.reference is None:
            self.reference = self._ask(
                CheckpointAnswerer(self.checkpoint.path, load_checkpoint(self.checkpoint.path))
            )
            if self.budget.metric not in (MEAN, *self.reference):
                raise UsageError(
                    f"--metric {self.budget.metric}: the data have no questions of this task; "
                    f"choose one of: {', '.join(self.reference)}"
                )
        self.built += 1
        out = self.folder / f"mixture-{self.built}"
        result = build(
            replace(
                self.options,
                scheme=mixture.scheme,
                out=out,
                questions=0,
                allow_unverified=True,
                dump=None,
            )
        )
        scores = self._ask(BundleAnswerer(out))
        shutil.rmtree(out)
        lost = {task: self.reference[task] - scores[task] for task in scores}
        tasks = [points for task, points in lost.items() if task != SAME]
        drop = sum(tasks) / len(tasks) if self.budget.metric == MEAN else lost[self.budget.metric]
        return replace(
            mixture, scores=scores, drop=drop if result.verdict == VERIFIED else math.inf
        )  # a mixture that fails parity cannot be chosen

    def _ask(self, answerer: Answerer) -> dict[str, float]:
        figures, _, rows = evaluate(answerer, self.examples, faults=Faults(True))
        self.answers = self.answers or [row.answer for row in rows]
        same = (
            100
            * sum(row.answer == answer for row, answer in zip(rows, self.answers, strict=True))
            / len(rows)
        )
        return {task: row["accuracy"] for task, row in figures.figures().items()} | {SAME: same}


def _loss_of(mixture: Mixture) -> float:
    assert mixture.drop is not None, "measured before"
    return mixture.drop


def _total(checkpoint: StoredCheckpoint, scheme: Scheme) -> int:
    return sum(part_bytes(checkpoint.spec, scheme).values())


def _summary(choice: Choice) -> str:
    """Returns for example "9 int4/128, 2 int4/32, 1 int8"."""
    kinds = [kind for kind in CANDIDATES["vision"] if kind in choice.values()]
    return ", ".join(f"{sum(value == kind for value in choice.values())} {kind}" for kind in kinds)
