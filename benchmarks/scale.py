"""Builds a preset with random weights on this machine and asks it one question. Reports
minutes, memory, disk and speed for model sizes that have no trained checkpoint.

python benchmarks/scale.py --preset 7b --folder /data/scale [--precision int8 int4]
[--rounding mse] [--samples 4] [--tokens 16] [--keep-files]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import write_random
from trainer.config import find_preset
from trainer.datasets.scene_text import corpus
from trainer.tokenize import build_tokenizer

_SAMPLE = Path(__file__).parent.parent / "runtime" / "demo" / "sample.png"


_CODE = """
import atexit, sys
from runtime.output.console import peak_memory_mib
from {module} import main
atexit.register(lambda: print(peak_memory_mib(), file=sys.stderr))
main()
"""


def timed(module: str, *arguments: str) -> tuple[dict[str, Any], float, float]:
    """Runs a command that prints one JSON object. Returns the object, the seconds, and
    the peak memory of that process in MiB.
    """
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", _CODE.format(module=module), *arguments],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(
            f"{module} {' '.join(arguments)} failed: {result.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(result.stdout), time.monotonic() - started, float(result.stderr.split()[-1])


def say(row: dict[str, Any]) -> None:
    """Prints one line of JSON."""
    print(json.dumps(row), flush=True)


def build(checkpoint: Path, out: Path, given: argparse.Namespace, precision: str) -> None:
    """Builds a bundle and prints its size, time, memory and parity."""
    command = ["build", str(checkpoint), "--precision", precision, "--samples", str(given.samples)]
    if given.rounding and precision.startswith("int4"):
        command += ["--rounding", given.rounding]
    result, seconds, peak = timed(
        "export.cli", *command, "--questions", "0", "--json", "-o", str(out)
    )
    say(
        {
            "precision": precision,
            "minutes": round(seconds / 60, 2),
            "build_peak_mib": round(peak),
            "bundle_gb": round(result["bytes"] / 1e9, 3),
            "verdict": result["verdict"],
            "parity": {stage["stage"]: stage["error"] for stage in result["stages"]},
        }
    )


def ask(bundle: Path, given: argparse.Namespace, attempt: str) -> None:
    """Asks a bundle one question and prints the times."""
    limits = ["--max-new-tokens", str(given.tokens), "--context", str(given.context)]
    answer, seconds, peak = timed(
        "runtime.cli.run", str(_SAMPLE), "describe", "--bundle", str(bundle), "--json", *limits
    )
    times = answer["timings"]
    first = sum(times[stage] for stage in ("decode_image", "preprocess", "vision", "prefill"))
    say(
        {
            "run": attempt,
            "visual_tokens": answer["visual_tokens"],
            "first_token_ms": round(first),
            "vision_ms": round(times["vision"]),
            "prefill_ms": round(times["prefill"]),
            "tokens_per_second": round(1e3 / times["per_token"], 2),
            "run_peak_mib": round(peak),
            "process_seconds": round(seconds, 1),
        }
    )


def options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="edge")
    parser.add_argument(
        "--folder", type=Path, required=True, help="an empty folder on a disk with room"
    )
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--rounding", help="how 4-bit weights are rounded: nearest, mse, gptq")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--keep-files", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line per stage."""
    given = options()
    checkpoint = given.folder / given.preset
    started = time.monotonic()
    if not checkpoint.exists():
        write_random(checkpoint, find_preset(given.preset).spec, build_tokenizer(corpus()).to_str())
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    minutes = round((time.monotonic() - started) / 60, 2)
    say({"checkpoint_gb": round(size / 1e9, 2), "minutes": minutes})
    for precision in given.precision:
        out = given.folder / f"{given.preset}-{precision}"
        build(checkpoint, out, given, precision)
        for attempt in ("first", "second"):  # the first run also hashes every file
            ask(out, given, attempt)
        if not given.keep_files:
            shutil.rmtree(out)
    if not given.keep_files:
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
