"""Compares this repository's runtime with onnxruntime-genai, OpenVINO, llama.cpp and
PyTorch, on the same random weights in one run.

Every contender has its own process. Each round measures all of them in turn, so that
ratios are meaningful on a noisy machine. It measures a prefill of 288 tokens, 64 decode
steps after it, an image, loading, memory, disk and agreement with PyTorch. Each round
also measures the machine's own limits.

    pip install torch==2.13.0 && pip install -e ".[peers]"
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/peers.py --folder DIR [--rounds 5] [--only NAME ...] \
        [--json FILE] [--markdown FILE] [--python ENGINE=INTERPRETER ...]

The folder keeps weights and conversions for the next run (25 GB with everything). If a
package is missing, only its rows are absent. Engines whose packages conflict with
others can use their own environment: --python intel=/envs/openvino/bin/python.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_THREADS = 2
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, str(_THREADS))

import numpy as np  # noqa: E402 (it reads its threads from the environment)
from contenders import CHECKPOINT, CONTENDERS, ENGINES, Contender  # noqa: E402
from contenders.client import Absent, Pool  # noqa: E402
from contenders.machine import bandwidth_gbs, describe, multiply_gflops  # noqa: E402
from contenders.report import markdown, ratios, summary  # noqa: E402

_REFERENCES = {"decoder": "PyTorch fp32", "vision": "PyTorch vision fp32"}
_SLOW = (
    "PyTorch bf16",
)  # measured only if named with --only: a round takes minutes on CPUs without bf16 instructions


def say(text: str) -> None:
    """Prints progress to standard error."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Run:
    """The results of each contender during the run. A contender that fails is dropped
    from all later rounds.
    """

    def __init__(self, folder: Path, pool: Pool, chosen: Sequence[str]) -> None:
        self._folder, self.pool = folder, pool
        self.names = list(chosen)
        self.absent: dict[str, str] = {}
        self.rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        self.limits: list[dict[str, float]] = []
        self.checks: dict[str, dict[str, float]] = {}

    def prepare(self) -> None:
        """Makes the files of all contenders, one after another."""
        self._each("preparing", lambda contender: self.pool.once(contender, "prepare"))

    def check(self) -> None:
        """Compares the outputs of all contenders with those of PyTorch, which are kept
        in the folder.
        """
        references = {
            part: self._folder / f"{CHECKPOINT}-reference-{part}.npy" for part in _REFERENCES
        }
        for part in {CONTENDERS[name].part for name in self.names}:
            if not references[part].exists():
                self.pool.ask(CONTENDERS[_REFERENCES[part]], "check", file=str(references[part]))

        def compare(contender: Contender) -> None:
            outputs = self._folder / "outputs.npy"
            self.pool.ask(contender, "check", file=str(outputs))
            self.checks[contender.name] = agreement(
                np.load(references[contender.part]), np.load(outputs), contender.part == "decoder"
            )

        self._each("checking", compare)

    def round(self, number: int) -> None:
        """Runs one round over all remaining contenders. Even rounds run in reverse
        order, so that no contender always follows the same neighbour.
        """
        self.limits.append({"read_gbs": bandwidth_gbs(_THREADS), "gflops": multiply_gflops()})

        def measure(contender: Contender) -> None:
            self.rounds[contender.name].append(self.pool.ask(contender, "measure"))

        self._each(f"round {number}:", measure, number % 2 == 0)

    def trim(self) -> None:
        """Drops rounds that not all contenders have finished. Exits if nothing was
        measured.
        """
        whole = min((len(self.rounds[name]) for name in self.names), default=0)
        self.limits = self.limits[:whole]
        self.rounds = {name: rounds[:whole] for name, rounds in self.rounds.items()}
        if not whole:
            raise SystemExit(
                "nothing could be measured: "
                + "; ".join(f"{name}: {reason}" for name, reason in self.absent.items())
            )

    def _each(self, text: str, call: Any, backwards: bool = False) -> None:
        for name in reversed(list(self.names)) if backwards else list(self.names):
            say(f"{text} {name}")
            try:
                call(CONTENDERS[name])
            except Absent as reason:
                self.names.remove(name)
                self.absent[name] = str(reason)
                say(f"absent: {name}: {reason}")


def agreement(wanted: Any, found: Any, logits: bool) -> dict[str, float]:
    """Returns how close outputs [N, V] are to PyTorch's: the smallest cosine of a row
    and the relative error. For logits, also the share of rows with the same best token.
    """
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    cosine = (
        (wanted * found).sum(-1) / np.linalg.norm(wanted, axis=-1) / np.linalg.norm(found, axis=-1)
    )
    result = {
        "cosine": float(cosine.min()),
        "relative_error": float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted)),
    }
    return result | (
        {"top1": float((wanted.argmax(-1) == found.argmax(-1)).mean())} if logits else {}
    )


def commit() -> str:
    """Returns the measured commit, or an empty string outside a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    return ""


def collect(run: Run) -> dict[str, Any]:
    """Returns all results as one JSON object."""
    measured = {name: run.rounds[name] for name in run.names}
    rows = {
        name: summary(name, rounds, run.pool.loads[name], run.checks[name], run.limits)
        for name, rounds in measured.items()
    }
    when = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    result = {
        "rows": rows,
        "ratios": ratios(measured),
        "absent": run.absent,
        "limits": run.limits,
        "machine": describe(),
        "threads": _THREADS,
    }
    return result | {"date": when, "commit": commit(), "command": shlex.join(["python", *sys.argv])}


def choose(only: Sequence[str] | None) -> list[str]:
    """Returns the contenders with a given name or with a given word in their names.
    Without names, returns all but the slow ones. Exits if a word matches no contender.
    """
    if not only:
        return [name for name in CONTENDERS if name not in _SLOW]
    for word in only:
        if not any(word.lower() in name.lower() for name in CONTENDERS):
            raise SystemExit(f"--only {word}: choose from {', '.join(CONTENDERS)}")
    return [
        name
        for name in CONTENDERS
        if any(
            word == name or (word not in CONTENDERS and word.lower() in name.lower())
            for word in only
        )
    ]


def main() -> None:
    """Prepares, checks and measures all contenders, then prints the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="weights and conversions, kept for the next run"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders whose name holds one of these"
    )
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="ENGINE=INTERPRETER",
        help=f"another environment for one of: {', '.join(ENGINES)}",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("INFMLLM_CACHE", str(folder / "cache"))
    pool = Pool(folder, dict(pair.split("=", 1) for pair in given.python), sys.executable, _THREADS)
    run = Run(folder, pool, choose(given.only))
    try:
        run.prepare()
        run.check()
        with contextlib.suppress(KeyboardInterrupt):  # whole rounds are reported
            for number in range(1, given.rounds + 1):
                run.round(number)
        run.trim()
        result = collect(run)
    finally:
        pool.end()
    text = markdown(result)
    print(text, end="")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.markdown:
        given.markdown.write_text(text)


if __name__ == "__main__":
    main()
