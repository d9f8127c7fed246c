# Every target sets up what it needs; PYTHON may name another interpreter (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-fast check format clean help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpscale needs Python >= 3.11; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,plots,bench,dev]'
	touch $@

quickstart: $(STAMP)  ## train a private CNN on 4,500 real MNIST digits (epsilon 3)
	$(BIN)/dpscale train configs/quickstart.toml

test: $(STAMP)  ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(STAMP)  ## the tests to run before each commit
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

check: $(STAMP)  ## formatter, linter, type checker, layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(STAMP)  ## let the formatter rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
