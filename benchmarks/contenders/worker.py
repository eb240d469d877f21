"""Runs one contender in its own process. Reads commands as JSON lines from standard
input and answers each with one JSON line.

Output of the engines goes to standard error. Between commands the process blocks on a
read, so it takes no processor time from the others.

python -m contenders.worker FOLDER NAME THREADS   (started by `benchmarks/peers.py`)
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from contenders import CONTENDERS, CONTEXT, PROMPT, STEPS, Contender, Decoder, Vision
from contenders.weights import image_inputs, prompt_tokens
from runtime.output.console import peak_memory_mib

CHECK_STEPS = 4
__all__ = ["CHECK_STEPS", "Worker"]


def resident_mib() -> float:
    """Returns the current resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Worker:
    """The commands of a worker. Each returns the answer to send back."""

    def __init__(self, folder: Path, contender: Contender, threads: int) -> None:
        self._folder, self._contender, self._threads = folder, contender, threads
        self._model: Any = None
        self._warm = False

    def prepare(self) -> dict[str, Any]:
        """Makes the contender's files."""
        started = time.monotonic()
        importlib.import_module(f"contenders.{self._contender.engine}").prepare(
            self._folder, self._contender
        )
        return {"prepare_s": time.monotonic() - started}

    def load(self) -> dict[str, Any]:
        """Imports the engine, then loads the model. Only the second part counts as load
        time.
        """
        module = importlib.import_module(f"contenders.{self._contender.engine}")
        before, started = resident_mib(), time.perf_counter()
        self._model = module.load(self._folder, self._contender, self._threads)
        took = time.perf_counter() - started
        weights = getattr(self._model, "weight_bytes", None)
        versions = module.versions()
        memory = {"imported_mib": before, "loaded_mib": resident_mib()}
        return {
            "load_s": took,
            "disk_bytes": self._model.disk_bytes,
            "weight_bytes": weights,
            "versions": versions,
            **memory,
        }

    def check(self, file: str) -> dict[str, Any]:
        """Writes the outputs for the common inputs: logits after the prompt and after
        each of a few fixed tokens, or image embeddings.

        This also warms up the model.
        """
        self._warm = True
        if self._contender.part == "vision":
            np.save(file, self._model.embed(*image_inputs(self._folder)))
            return {}
        tokens = prompt_tokens(PROMPT + CHECK_STEPS)
        model: Decoder = self._model
        model.reset()
        rows = [np.array(model.prefill(tokens[:PROMPT]))] + [
            np.array(model.step(token)) for token in tokens[PROMPT:]
        ]
        np.save(file, np.stack(rows))
        return {}

    def measure(self) -> dict[str, Any]:
        """Measures one round: the seconds of a prefill and of greedy decoding after it,
        or of an image. An untimed call precedes the first round unless `check` ran
        before.
        """
        once = self._measure_vision if self._contender.part == "vision" else self._measure_decoder
        if not self._warm:
            once()
            self._warm = True
        return {**once(), "peak_mib": peak_memory_mib()}

    def _measure_vision(self) -> dict[str, float]:
        model: Vision = self._model
        pixels, pool = image_inputs(self._folder)
        started = time.perf_counter()
        model.embed(pixels, pool)
        return {"vision_s": time.perf_counter() - started}

    def _measure_decoder(self) -> dict[str, float]:
        model: Decoder = self._model
        steps = STEPS if self._warm else 4
        tokens = prompt_tokens(PROMPT)
        model.reset()
        started = time.perf_counter()
        logits = model.prefill(tokens)
        middle = time.perf_counter()
        for _ in range(steps):
            logits = model.step(int(logits.argmax()))
        return {"prefill_s": middle - started, "decode_s": time.perf_counter() - middle}


def main() -> None:
    """Serves commands until standard input ends."""
    folder, name, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be mixed with answers
    worker = Worker(Path(folder), CONTENDERS[name], int(threads))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            result = getattr(worker, command.pop("do"))(**command)
        except ModuleNotFoundError as error:
            result = {"missing": str(error)}
        except Exception as error:  # engines raise any type; the row is reported as absent
            result = {
                "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"
            }
        answers.write(json.dumps(result) + "\n")
        answers.flush()


assert CONTEXT > PROMPT + STEPS, "the cache holds the prompt and what is decoded"
if __name__ == "__main__":
    main()
