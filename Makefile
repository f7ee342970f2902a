# Everything starts from an empty machine with Python 3.11, make and a C++ compiler: every target sets up what it needs.

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# any Python that is new enough; PYTHON=... names another
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$name && exit; done; echo python3)
STAGE := tools/stage
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
# what is tested is this checkout
unexport PYTHONPATH

APART := dist or e2e or gpu

.NOTPARALLEL:
.PHONY: help setup train check test test-all lint types imports unit ranks wheel bench clean

help: ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: ## make .venv/ with everything in it (once; CPU or CUDA, whichever is here)
	@$(PYTHON) tools/setup.py

train: setup ## train a small language model on this machine, resume it elsewhere, show what came out
	@tools/train.sh

check: setup lint types imports ## ruff, mypy and the import contracts

test: setup lint types imports unit ranks wheel ## everything that CI runs
	@printf '\nmake test: everything passed\n'

test-all: test ## make test, then the long matrices
	@$(STAGE) "long matrices" pytest -q --durations=20 -m slow tests

lint: setup
	@$(STAGE) "ruff: lint" ruff check .
	@$(STAGE) "ruff: format" ruff format --check .

types: setup
	@$(STAGE) "mypy" mypy

imports: setup
	@$(STAGE) "import contracts" lint-imports

unit: setup
	@$(STAGE) "tests without processes of their own" pytest -q -n 2 --durations=10 -m "not ($(APART)) and not slow" tests

ranks: setup
	@$(STAGE) "multi-rank and end-to-end tests" pytest -q --durations=20 -m "($(APART)) and not slow" tests

wheel: setup
	@$(STAGE) "the wheel in a fresh environment" python tools/test_wheel.py

bench: setup ## paired benchmarks, ratios printed; fails at the end where one missed its target
	@worst=0; for file in benchmarks/bench_*.py; do \
		$(STAGE) "$$file" python $$file; code=$$?; [ $$code -le $$worst ] || worst=$$code; \
	done; exit $$worst

clean: ## remove build products and caches (not .venv, not runs)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "removed build products and caches"
