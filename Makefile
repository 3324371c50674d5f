# Needs only make and Python 3.11 or newer. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
PYTEST_ARGS ?=
# A test uses one core, and a worker 1.3 GB of memory. A file of tests stays with one worker (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test quickstart lint clean

help:
	@echo "make venv        pinned environment in $(VENV), made or renewed only if it is missing or outdated"
	@echo "make test        the fast tests, then those marked slow; PYTEST_ARGS='-k perplexity' narrows them, '-n 0' runs them in one process"
	@echo "make quickstart  train a small model on a laptop"
	@echo "make lint        ruff, then mypy"
	@echo "make clean       remove the environment, caches and build leftovers"

venv: $(STAMP)

# torch goes first, so that a failing download of the largest package shows at once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "modeling_cse needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# pytest exits with 5 when it found no test: fine for one of the two passes (PYTEST_ARGS may narrow them), not for both.
test: venv
	@fast=0; $(PYTEST) -m "not slow" $(PYTEST_ARGS) || fast=$$?; \
	case $$fast in 0|5) ;; *) exit $$fast ;; esac; \
	slow=0; $(PYTEST) -m slow $(PYTEST_ARGS) || slow=$$?; \
	if [ $$slow -eq 5 ]; then exit $$fast; fi; \
	exit $$slow

quickstart: venv
	$(BIN)/python examples/run_clm.py configuration/recipes/quickstart.yaml

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
