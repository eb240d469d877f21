"""Measures the accuracy of GPU bundles on a machine without a GPU. Their graphs run
literally on the CPU (`export.parity.cpu_reference`), on the same questions as
`infmllm-eval`.

python benchmarks/gpu_accuracy.py TENSORRT.bundle ... [--data synthetic:500]
[--visual-tokens 16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from export.parity.cpu_reference import reference_session
from runtime.contract.bundle import read_bundle
from runtime.data.bad_rows import Faults
from runtime.evaluation.cli import BundleAnswerer
from runtime.evaluation.evaluate import evaluate, open_examples


def main() -> None:
    """Prints the accuracy per task of each bundle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--data", default="synthetic:500")
    parser.add_argument("--visual-tokens", type=int)
    options = parser.parse_args()
    examples = open_examples(options.data, False)
    for path in options.bundles:
        session = reference_session(read_bundle(path))
        tasks, _, _ = evaluate(
            BundleAnswerer(session), examples, options.visual_tokens, faults=Faults(False)
        )
        figures = "  ".join(
            f"{task} {row['accuracy']:.1f}" for task, row in tasks.figures().items()
        )
        print(
            f"{path.name:24} {figures}  "
            f"({sum(row['count'] for row in tasks.figures().values()):.0f} samples)",
            flush=True,
        )


if __name__ == "__main__":
    main()
