# Everything runs in .venv, which the first target makes. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= qwen2.5-coder-1.5b-instruct

.PHONY: demo test test-slow test-gpu test-floors check format bench bench-gpu clean

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

# The oldest versions that pyproject.toml allows, all together; torch as it is tested, and old releases may warn of what is newer
test-floors:
	rm -rf $(VENV)-floors
	$(PYTHON) -m venv $(VENV)-floors
	$(PYTHON) tests/floors.py > $(VENV)-floors/floors.txt
	$(VENV)-floors/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-floors/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)-floors/bin/python -m pip install --quiet --constraint $(VENV)-floors/floors.txt --editable ".[dev,quantized]"
	$(VENV)-floors/bin/pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal \
		-W default::DeprecationWarning -W default::FutureWarning

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
	rm -rf $(VENV) $(VENV)-floors build dist results .pytest_cache .mypy_cache .ruff_cache .hypothesis
