# Each target installs what it needs in .venv, once: a stamp file records which extra is installed.
# Tests that a target runs must not be skipped: it has installed all that they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest --fail-on-skip

.PHONY: help demo perceiver test parity bench check clean

help:
	@echo "make demo       train the digits autoencoder and draw what it rebuilds"
	@echo "make perceiver  train a language model on Python's own library and fill in masks"
	@echo "make test       run the tests and every example in the docs"
	@echo "make parity     compare the layers with torch, the Perceivers with transformers"
	@echo "make bench      measure speed against what people use today, and write docs/benchmarks.md"
	@echo "make check      formatting, lint and strict types"
	@echo "make clean      remove the environment and what was generated"

demo: $(VENV)/installed-demo
	$(BIN)/python docs/examples/digits_autoencoder.py

perceiver: $(VENV)/installed-perceiver
	$(BIN)/python docs/examples/perceiver_mlm.py

test: $(VENV)/installed-test
	$(PYTEST) --numprocesses auto --ignore tests/parity

parity: $(VENV)/installed-parity
	$(PYTEST) tests/parity

bench: $(VENV)/installed-bench
	$(BIN)/python -m tests.benchmarks --page docs/benchmarks.md

check: $(VENV)/installed-check
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'flax_extra needs Python 3.11 or newer; got ' + sys.version.split()[0] + '. Say which: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "installing flax_extra[$*] into $(VENV)"
	$(PIP) install --editable '.[$*]'
	@touch $@
