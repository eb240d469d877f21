"""What a GPU does with our bundles, found out by one command: `python -m tests.gpu
--out DIR`.

Every engine that loads is held against the bundles' golden results, timed, and timed
again beside PyTorch on the same weights; one JSON file and one HTML page say what was
found, which goals are met, and what was absent and why. Not collected by pytest:
`tests/runtime/test_gpu_report.py` runs it where there is no GPU, and on engines whose
GPU is stood in for.
"""
