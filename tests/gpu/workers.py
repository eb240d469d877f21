"""Work that runs in separate processes, so that a GPU fault ends only one step:
building, this project's engines, and PyTorch.

A role is a class; its methods are commands with JSON arguments and answers. `python -m
tests.gpu.workers ROLE` reads one command per line from standard input. `reply` runs a
command without a process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from runtime.bench.measure import BenchOptions, bundle_work, measure
from runtime.bench.metrics import summary
from runtime.contract.bundle import Bundle, read_bundle
from runtime.contract.errors import EngineError, InfMLLMError
from runtime.contract.spec import ModelSpec
from runtime.engines import TARGETS, EngineOptions, load_engine
from runtime.session import Session
from tests.gpu import parity, timing

__all__ = ["ROLES", "Builder", "Ours", "PyTorch", "reply"]

Answer = dict[str, Any]


class Builder:
    """Makes checkpoints and bundles."""

    def checkpoint(self, preset: str, folder: str) -> Answer:
        """Returns the demo checkpoint for `nano`. For other presets, writes random
        weights from seed 0, unless they exist.
        """
        from trainer.checkpoint import DEMO, write_random
        from trainer.config import find_preset
        from trainer.datasets.scene_text import corpus
        from trainer.tokenize import build_tokenizer

        if preset == DEMO_PRESET:
            return {"path": str(DEMO)}
        if not (path := Path(folder) / preset).exists():
            write_random(path, find_preset(preset).spec, build_tokenizer(corpus()).to_str())
        return {"path": str(path)}

    def build(
        self,
        checkpoint: str,
        target: str,
        scheme: str,
        out: str,
        samples: int,
        questions: int,
        random: bool,
    ) -> Answer:
        """Builds a bundle. Random 4-bit weights are rounded without GPTQ, which takes
        an hour at 7B and gains nothing on random weights.
        """
        from export.pipeline import BuildOptions, build
        from export.schemes import choose_scheme, find_scheme

        found, begun = find_scheme(scheme, target), time.monotonic()
        if random and any(linear.bits == 4 for linear in found.parts.values()):
            found = choose_scheme(scheme, rounding="mse", target=target)
        options = BuildOptions(
            Path(checkpoint),
            found,
            target,
            Path(out),
            samples=samples,
            questions=0 if random else questions,
        )
        return {
            "verdict": build(
                options, progress=lambda step: print(f"  {step}", file=sys.stderr, flush=True)
            ).verdict,
            "s": time.monotonic() - begun,
        }


DEMO_PRESET = "nano"


class Ours:
    """One of this project's engines with one bundle."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def prove(self, bundle: str, target: str) -> Answer:
        """See `parity.prove`. Keeps the engine for later commands. Raises `EngineError`
        if it cannot be loaded, or if another engine would run instead.
        """
        read = read_bundle(bundle)
        read.verify_once()
        begun = time.perf_counter()
        engine = load_engine(read, EngineOptions())
        loaded = (time.perf_counter() - begun) * 1e3
        found = f"{type(engine).__module__}:{type(engine).__qualname__}"
        if found != TARGETS[target].engine:
            raise EngineError(
                f"target {target} has no engine of its own here, {found} would run its bundles; "
                f"see the rows of that target"
            )
        result = parity.prove(read, engine)
        self._session = Session(read, engine)
        return {**result, "load_ms": loaded, "verdict": read.verdict, "work": _work(read)}

    def answers(self, new_tokens: int) -> Answer:
        """See `parity.answers`."""
        assert self._session, "proved before"
        return {"tokens": parity.answers(self._session, new_tokens)}

    def round(self, steps: int) -> dict[str, float]:
        """See `timing.once`."""
        assert self._session, "proved before"
        return timing.once(self._session.engine, self._session.table, self._session.spec, steps)

    def bench(self, bundle: str, repetitions: int, new_tokens: int) -> Answer:
        """Returns the figures of the latency report."""
        report = measure(BenchOptions(Path(bundle), repetitions, min(3, repetitions), new_tokens))
        gpu = vars(report.gpu) if report.gpu else None
        return {**summary(report), "gpu": gpu, "missing": report.missing}

    def copy(self) -> Answer:
        """Measures the copy bandwidth with cuda-python, for machines without PyTorch."""
        from tests.gpu.bandwidth import copy_gbs

        return {"gbs": copy_gbs()}


class PyTorch:
    """A checkpoint in PyTorch. `device` is "cuda", except in tests without a GPU."""

    def load(self, checkpoint: str, dtype: str, device: str) -> Answer:
        """Loads the weights to the device."""
        import torch

        from tests.gpu import pytorch

        _require(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            False  # TF32 would make fp32 results less exact
        )
        self._module, self._engines = pytorch, dict[str, Any]()
        self._model = pytorch.load_model(Path(checkpoint), getattr(torch, dtype), device)
        return {"torch": torch.__version__}

    def stages(self, bundle: str) -> Answer:
        """Replays the goldens with PyTorch itself, which shows the error of the
        precision alone on this GPU.
        """
        session = self._over(bundle, 0)
        return {"stages": parity.stages_of(session), "engine": session.engine.version}

    def answers(self, bundle: str, new_tokens: int) -> Answer:
        """See `parity.answers`."""
        return {"tokens": parity.answers(self._over(bundle, new_tokens), new_tokens)}

    def _over(self, bundle: str, new_tokens: int) -> Session:
        from runtime.contract.bundle import GOLDENS
        from runtime.contract.goldens import read_goldens

        read = read_bundle(bundle)
        goldens = read_goldens(read.file(GOLDENS))
        rows = max(
            golden.pool_size**2
            + len(golden.before)
            + len(golden.after)
            + max(len(golden.tokens), new_tokens)
            for golden in goldens
        )
        return Session(
            read, self._module.PyTorchEngine(self._model, min(rows + 1, read.spec.decoder.context))
        )

    def round(self, steps: int, variant: str) -> dict[str, float]:
        """See `timing.once`. The cache has exactly the rows that the round needs, which
        is PyTorch's best case.
        """
        spec: ModelSpec = self._model.spec
        if variant not in self._engines:
            self._engines[variant] = self._module.PyTorchEngine(
                self._model, timing.prompt_rows(spec) + steps, variant
            )
        return timing.once(self._engines[variant], None, spec, steps)

    def copy(self, device: str) -> Answer:
        """Measures the copy bandwidth of the device's memory."""
        from tests.gpu import pytorch

        _require(device)
        return {
            "gbs": pytorch.copy_gbs(device)
            if device == "cuda"
            else pytorch.copy_gbs(device, 1 << 24)
        }


def _work(bundle: Bundle) -> Answer:
    """Returns the bytes that a timed decode step must read: the decoder's weights, and
    the bytes per cache row with the number of prompt rows.
    """
    rows = timing.prompt_rows(bundle.spec)
    work = bundle_work(bundle, rows)
    return {
        "decoder_weight_bytes": work.decoder_weight_bytes,
        "cache_row_bytes": work.cache_row_bytes,
        "rows": rows,
    }


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"PyTorch {torch.__version__} finds no CUDA GPU; PyTorch's rows need one")


ROLES: dict[str, type] = {role.__name__: role for role in (Builder, Ours, PyTorch)}


def reply(worker: object, do: str, **arguments: Any) -> Answer:
    """Returns a command's answer, or the reason why there is none: `missing` for a
    missing package, `refused` for one of the project's errors, `broken` for anything
    else.
    """
    try:
        return {"answer": getattr(worker, do)(**arguments)}
    except ImportError as error:
        return {
            "missing": f"{error.name or 'a package'} cannot be imported "
            f"({' '.join(str(error).split()):.160})"
        }
    except InfMLLMError as error:
        return {"refused": " ".join(str(error).split()), "kind": type(error).__name__}
    except Exception as error:  # from any library
        lines = str(error).strip().splitlines()
        return {"broken": f"{type(error).__name__}: {lines[0] if lines else 'no message':.300}"}


def main() -> None:
    """Serves commands until standard input ends. Output of libraries goes to standard
    error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = ROLES[sys.argv[1]]()
    for line in sys.stdin:
        answers.write(json.dumps(reply(worker, **json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
