# `make demo` trains, prunes and saves a model; `make test` runs the test suite. Both
# make a virtual environment in .venv first, with everything they need.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A worker runs whole files, in the order of tests/conftest.py.
BY_FILE := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint speed clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(BY_FILE)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 \
	  $(BIN)/python -m pytest $(BY_FILE) tests/sharding

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

speed: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed

# Made again when what is installed changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
