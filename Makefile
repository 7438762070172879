# `make demo` and `make test` set up everything they need in .venv; `make help` lists all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-fast chaos lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cloud,tensorboard,mlflow]'
	touch $@

demo: $(STAMP) ## run the quickstart study and write its report (about 4 minutes on 2 cores)
	$(BIN)/maskstudy run study/examples/quickstart.yaml

test: $(STAMP) ## run the tests: two files at a time, then those that start Ray, one by one
	rm -f build/durations.json
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not ray' --durations=15
	$(BIN)/python -m pytest -m 'ray and not chaos' --durations=15

chaos: $(STAMP) ## run the long tests: series of faults, fleets, hosts that are cut off, tokens
	$(BIN)/python -m pytest -m chaos --durations=15

test-fast: $(STAMP) ## run the tests that start neither Ray nor a browser
	$(BIN)/python -m pytest -m 'not ray and not browser'

lint: $(STAMP) ## ruff and mypy, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
