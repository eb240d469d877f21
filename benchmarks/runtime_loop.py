"""Measures, for one bundle, the cost of the runtime's Python code per token and the
time that caches save for a second question.

python benchmarks/runtime_loop.py infmllm-bundle [--image runtime/demo/sample.png]
[--repetitions 9] [--tokens 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime import Decoding, Session, load
from runtime.engines.onnxruntime import cpu as ort

_FIRST, _SECOND = "describe", "what is there to see?"


class Engine:
    """Measures the seconds spent inside ONNX Runtime."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.returned: Callable[[], object] = lambda: None
        run = ort._Call.run

        def counted(call: ort._Call) -> NDArray[np.float32]:
            started = time.perf_counter()
            found = run(call)
            self.seconds += time.perf_counter() - started
            self.returned()
            return found

        # Replaced on purpose, by a function whose first parameter has another name.
        ort._Call.run = cast(Any, counted)  # type: ignore[method-assign]


def per_token(session: Session, image: bytes, engine: Engine, tokens: int) -> tuple[float, float]:
    """Returns the microseconds of Python and the milliseconds in total per token, while
    text is streamed. The prompt must already be in the cache.
    """
    stream = session.stream(
        image, _FIRST, "caption", max_new_tokens=tokens, decoding=Decoding(lookup=0)
    )
    calls: list[
        tuple[float, float]
    ] = []  # for each engine call: the time of its return, and the seconds in the engine so far
    engine.returned = lambda: calls.append((time.perf_counter(), engine.seconds))
    stream.finish()
    engine.returned = lambda: None
    (first, inside_first), (last, inside_last), count = (
        calls[1],
        calls[-1],
        max(1, len(calls) - 2),
    )  # excludes the prompt and the end of the answer
    return 1e6 * (last - first - (inside_last - inside_first)) / count, 1e3 * (last - first) / count


def first_token(session: Session, image: bytes, question: str) -> float:
    """Returns the milliseconds to the first token of a question."""
    started = time.perf_counter()
    session.ask(image, question, "vqa", max_new_tokens=1)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Prints the median and the best of each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, default=Path("runtime/demo/sample.png"))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=30)
    given = parser.parse_args()
    started = time.perf_counter()
    session, image, engine = load(given.bundle), given.image.read_bytes(), Engine()
    print(f"load {1e3 * (time.perf_counter() - started):.0f} ms")
    session.ask(image, _FIRST, max_new_tokens=2)
    rows: dict[str, list[float]] = {}

    def note(name: str, measure: Callable[[], float]) -> None:
        rows.setdefault(name, []).append(measure())

    for _ in range(given.repetitions):
        session.clear_caches()
        note(
            "first question, ms to first token", lambda: first_token(session, image, "what is it?")
        )
        note("second question on the same image", lambda: first_token(session, image, _SECOND))
        session.runner.prefix_cache.clear()
        note(
            "second question in another process (embeddings from disk)",
            lambda: first_token(session, image, _SECOND),
        )
        python, token = per_token(session, image, engine, given.tokens)
        rows.setdefault("Python per token, microseconds", []).append(python)
        rows.setdefault("token, ms", []).append(token)
    for name, values in rows.items():
        print(f"{name:60} median {statistics.median(values):10.2f}   best {min(values):10.2f}")


if __name__ == "__main__":
    main()
