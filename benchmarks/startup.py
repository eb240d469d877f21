"""Measures the start-up of `infmllm-run`: seconds from process start to the last token
of a caption, and import times. Run it on a quiet machine.

python benchmarks/startup.py [--bundle infmllm-bundle] [--image runtime/demo/sample.png]
[--repetitions 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

IMPORTS = {
    "python alone": "pass",
    "runtime.cli.run (parses arguments)": "import runtime.cli.run",
    "runtime.session + ONNX Runtime "
    "engine": "import runtime.cli.run, runtime.session, runtime.engines.onnxruntime.cpu",
}


def seconds(command: list[str]) -> float:
    """Returns the wall time of a command. Raises `CalledProcessError` if it fails."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Measures all rows interleaved and prints medians and best times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("infmllm-bundle"))
    parser.add_argument("--image", type=Path, default=Path("runtime/demo/sample.png"))
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    rows = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    run = "import sys; from runtime.cli.run import main; main()"
    rows["infmllm-run IMAGE describe"] = [
        sys.executable,
        "-c",
        run,
        str(arguments.image),
        "describe",
        "--bundle",
        str(arguments.bundle),
    ]
    for command in rows.values():  # warm the file cache
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.repetitions):
        for name, command in rows.items():
            times[name].append(seconds(command))
    for name, values in times.items():
        print(
            f"{name:40} median {statistics.median(values):.3f} s, best {min(values):.3f} s of "
            f"{len(values)}"
        )


if __name__ == "__main__":
    main()
