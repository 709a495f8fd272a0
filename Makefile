# Needs Python 3.11 or newer, pip and make; everything else comes from PyPI into a private environment.

VENV ?= .venv
SCENARIO ?= quickstart
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NEED := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-run  ## install, then compare all policies on a bundled scenario into results/
	$(BIN)/llmopt compare $(SCENARIO) --report results/$(SCENARIO)

test: $(VENV)/.stamp-dev  ## install with the test tools, then run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.stamp-dev  ## ruff check, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment, caches and results
	rm -rf $(VENV) build dist results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

# Some systems ship Python without ensurepip, so pip may have to come from outside the new environment.
$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3 python3.13 python3.12 python; do \
	  if $$python -c '$(NEED)' 2>/dev/null; then \
	    echo "environment: $(VENV), $$($$python --version)"; \
	    $$python -m venv $(VENV) 2>/dev/null && exit 0; \
	    $$python -m venv --without-pip $(VENV) && $$python -m pip --python $(BIN)/python install --quiet pip; \
	    exit $$?; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1

$(VENV)/.stamp-run: pyproject.toml | $(BIN)/python
	@echo "installing llmopt into $(VENV) (about a minute, most of it downloads)"
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	@echo "installing llmopt with its test tools into $(VENV) (about a minute, most of it downloads)"
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.stamp-run
