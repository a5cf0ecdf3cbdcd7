# Everything runs in .venv, which the first target makes. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= qwen2.5-coder-1.5b-instruct

.PHONY: demo test test-slow test-gpu check format bench bench-gpu clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --model $(MODEL)

test: $(VENV)/installed
	$(BIN)/pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/installed
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: $(VENV)/installed
	$(BIN)/pytest -m gpu -n 8

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/cag bench ttft --corpus examples/handbook/docs --questions examples/handbook/questions.jsonl \
		--model $(MODEL) --out results/ttft

bench-gpu: $(VENV)/installed
	$(BIN)/cag bench gpu --device cuda --out results/gpu

clean:
	rm -rf $(VENV) build dist results .pytest_cache .mypy_cache .ruff_cache .hypothesis
