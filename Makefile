# Each target alone, on a fresh machine with Python 3.11 or newer, sets up its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := trainer/demo/sample.png

.PHONY: run test lint bench clean

# torch is installed first and pinned, so that a CPU build at hand is taken and no other one is fetched later.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

run: $(VENV)/.ready
	$(BIN)/infmllm-export build --precision int8
	$(BIN)/infmllm-run $(SAMPLE) "describe"
	$(BIN)/infmllm-bench

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -q

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/startup.py
	$(BIN)/infmllm-bench

clean:
	rm -rf $(VENV) infmllm-bundle
