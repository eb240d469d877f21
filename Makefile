# Each target alone, on a fresh machine with Python 3.11 or newer, sets up its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := runtime/demo/sample.png

# Several test processes, each on a core of its own; `make test WORKERS=` runs one.
WORKERS := -n auto --maxprocesses 4 --dist loadfile

.PHONY: run test test-fast gpu-test lint docs bench clean

# torch is installed first and pinned, so that a CPU build at hand is taken and no other one is fetched later.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(VENV)/.export: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e ".[export]"
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) -e ".[dev]"
	touch $@

run: $(VENV)/.export
	$(BIN)/infmllm-export build --precision int8
	$(BIN)/infmllm-run $(SAMPLE) "describe"
	$(BIN)/infmllm-bench

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.dev lint docs
	$(BIN)/python -m pytest -q $(WORKERS)

# Leaves out the tests marked slow.
test-fast: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q -m "not slow" $(WORKERS)

# The documentation as a site; a warning is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Without a GPU it says what is absent, and why; docs/gpu.md has its other commands.
gpu-test: $(VENV)/.export
	$(BIN)/python -m tests.gpu --out gpu-report --preset nano --quick

bench: run
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) infmllm-bundle gpu-report
