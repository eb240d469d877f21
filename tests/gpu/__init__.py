"""Checks bundles on a real GPU with one command: `python -m tests.gpu --out DIR`.

Every engine that loads is compared with the bundles' golden results, timed alone, and
timed beside PyTorch on the same weights. One JSON file and one HTML page report the
results, the goals that are met, and everything that was absent, with reasons. pytest
does not collect this package. `tests/runtime/test_gpu_report.py` runs it without a GPU
and with simulated GPUs.
"""
