# Every command the README and .ci/run use. Nothing here asks a question or needs a terminal.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check bench trials paper

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with the library, its dependencies and the developer tools

# Redone when the dependencies change.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "needs Python 3.11 or newer, $(PYTHON) is older: make setup PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --editable '.[dev]'
	@touch $@

demo: setup ## train, generate, evaluate and report experiments/demo (5 minutes on 2 cores)
	$(BIN)/lyco-lab run experiments/demo

test: setup ## the tests that take less than five seconds each
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup ## the others
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: setup ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What begins with _ is shared by the scripts, and none itself.
bench: setup ## one script per question of speed
	@set -e; for script in tests/benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

# Hours on two cores, so with the least priority; OPTIONS=--resume goes on after an interruption.
trials: setup ## damage, interrupt and mutate tiny studies, and see that no number changes (hours)
	nice -n 19 $(BIN)/python -m tests.trials $(OPTIONS)

paper: setup ## the paper's figures, from the committed tables
	$(MAKE) -C paper PYTHON=$(CURDIR)/$(BIN)/python
