# Each target installs what it needs in .venv, once: a stamp file records which extra is installed.
# Tests that a target runs must not be skipped: it has installed all that they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest --fail-on-skip
PARALLEL := --numprocesses auto --dist worksteal
ALL := $(PARALLEL) --ignore tests/parity --ignore tests/mesh --ignore tests/docs
FAST := flax_extra tests $(ALL) --ignore tests/benchmarks --ignore tests/examples
ON_MESH := JAX_PLATFORMS=cpu $(BIN)/python docs/examples/train_on_a_mesh.py
MESH_PORT ?= 12355

.DEFAULT_GOAL := help
.PHONY: help demo perceiver generate mesh test test-fast slow-tests parity docs docs-test bench check format release-check dev clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo ## train the digits autoencoder and draw what it rebuilds
	$(BIN)/python docs/examples/digits_autoencoder.py

perceiver: $(VENV)/installed-perceiver ## train a language model on Python's own library and fill in masks
	$(BIN)/python docs/examples/perceiver_mlm.py

generate: $(VENV)/installed-generate ## train a decoder on Python's own library and write code with it
	$(BIN)/python docs/examples/write_code.py

mesh: $(VENV)/installed-perceiver ## train on a mesh of 8 devices, made of the processor, then on two processes of 4
	JAX_NUM_CPU_DEVICES=8 $(ON_MESH) --mesh 4 2 --fsdp --checkpoints build/mesh_of_one_process
	JAX_NUM_CPU_DEVICES=4 $(ON_MESH) --cluster localhost:$(MESH_PORT) 2 1 --checkpoints build/mesh_of_two & \
	JAX_NUM_CPU_DEVICES=4 $(ON_MESH) --cluster localhost:$(MESH_PORT) 2 0 --checkpoints build/mesh_of_two && wait $$!

test: $(VENV)/installed-test ## run the tests and every example in the docs
	$(PYTEST) $(ALL)
	$(PYTEST) $(PARALLEL) tests/mesh # in processes of their own, which make 8 devices of the host

test-fast: $(VENV)/installed-test ## run the tests of the library but those in tests/slow.txt, with fewer drawn examples
	HYPOTHESIS_PROFILE=fast $(PYTEST) $(FAST) -m 'not slow'

slow-tests: $(VENV)/installed-test ## measure which tests test-fast leaves out, and write tests/slow.txt
	rm -rf .pytest_cache
	HYPOTHESIS_PROFILE=fast $(PYTEST) $(FAST) --write-slow

parity: $(VENV)/installed-parity ## compare the layers with torch, the published models with transformers
	$(PYTEST) $(PARALLEL) tests/parity

docs: $(VENV)/installed-docs ## build the documentation site in build/docs/html; its pages run
	JAX_NUM_CPU_DEVICES=8 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs/html

docs-test: docs ## test the site: all names are in it, and Chromium opens it without an error
	$(PYTEST) docs/_ext tests/docs

bench: $(VENV)/installed-bench ## measure speed against what people use today, and write docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks --page docs/benchmarks.md

check: $(VENV)/installed-check ## formatting, lint, strict types of the library and of code that uses it
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-check ## format the code, and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

release-check: $(VENV)/installed-release ## build wheel and sdist, and try the wheel in an empty environment
	$(BIN)/python tests/release_check.py

dev: $(VENV)/installed-dev ## install everything for working on the library, and the pre-commit hooks
	$(BIN)/pre-commit install

clean: ## remove the environment and what was generated
	rm -rf $(VENV) build dist docs/reference .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'flax_extra needs Python 3.11 or newer; got ' + sys.version.split()[0] + '. Say which: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "installing flax_extra[$*] into $(VENV)"
	$(PIP) install --editable '.[$*]'
	@touch $@
