"""Stage latencies of several bundles of one model, interleaved in one run, so that their ratios mean something on a noisy machine.

python benchmarks/precisions.py fp32.bundle fp16.bundle int8.bundle [--repetitions 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np

from runtime import Session, load
from runtime.contract.pooling import pool_matrix

_TEXT_TOKENS = 11  # of a usual question
_STEPS = 20


def once(session: Session) -> dict[str, float]:
    """Milliseconds of one image, one prefill behind it, and one decoding step (mean of 20)."""
    spec, rng = session.spec, np.random.default_rng(0)
    size, p = spec.vision.image_size, spec.pool_sizes[0]
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    inputs = rng.normal(size=(1, p * p + _TEXT_TOKENS, spec.decoder.hidden)).astype(np.float32)
    marks = [time.perf_counter()]
    session.engine.embed_image(pixels, pool_matrix(spec.vision.grid, p))
    marks.append(time.perf_counter())
    session.engine.forward(inputs, 0)
    marks.append(time.perf_counter())
    for step in range(_STEPS):
        session.engine.forward(inputs[:, :1], inputs.shape[1] + step)
    marks.append(time.perf_counter())
    vision, prefill, decode = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
    return {"vision": vision, "prefill": prefill, "decode step": decode / _STEPS}


def main() -> None:
    """Prints median and best per bundle and stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    sessions = {path: load(path, threads=arguments.threads) for path in arguments.bundles}
    rows: dict[Path, list[dict[str, float]]] = {path: [] for path in sessions}
    for repetition in range(arguments.repetitions + 2):
        for path, session in sessions.items():
            times = once(session)
            if repetition >= 2:
                rows[path].append(times)
    for path, values in rows.items():
        cells = (f"{stage} {statistics.median(v[stage] for v in values):.2f} ({min(v[stage] for v in values):.2f})" for stage in values[0])
        print(f"{path.name:24} {'   '.join(cells)}   ms, median (best)")


if __name__ == "__main__":
    main()
