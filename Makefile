# Every target sets up what it needs; PYTHON may name another interpreter (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
CLUSTER ?= /tmp/dpscale-cluster

.PHONY: quickstart test test-fast check format bench bench-peers local-cluster stop-cluster soak fuzz clean help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpscale needs Python >= 3.11; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,images,parquet,text,plots,bench,dev]'
	touch $@

quickstart: $(STAMP)  ## train a private CNN on 4,500 real MNIST digits (epsilon 3)
	$(BIN)/dpscale train configs/quickstart.toml

test: $(STAMP)  ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slurm' --durations=15
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slurm --durations=15

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

bench: $(STAMP)  ## the measurements that README and docs quote (on an otherwise idle machine)
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/update_sharding.py
	$(BIN)/python benchmarks/clipping.py
	$(BIN)/python benchmarks/loading.py
	benchmarks/scaling.sh

bench-peers: $(STAMP)  ## Opacus and JAX Privacy: epsilon, speed and accuracy; Opacus in an environment of its own
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 opacus
	$(PEERS)/bin/python benchmarks/peers/accounting_opacus.py
	PYTHONPATH=. $(PEERS)/bin/python benchmarks/peers/clipping_opacus.py
	$(BIN)/python benchmarks/utility.py --opacus-python $(PEERS)/bin/python

local-cluster: $(STAMP)  ## a throw-away SLURM on this machine (apt-get install slurm-wlm munge)
	$(BIN)/python slurm/local-cluster/cluster.py start $(CLUSTER)

stop-cluster:  ## end it again
	$(BIN)/python slurm/local-cluster/cluster.py stop $(CLUSTER)

soak: $(STAMP)  ## 20 kills of random processes at random moments, on that SLURM
	DPSCALE_SOAK_KILLS=20 DPSCALE_REQUIRE_SLURM=1 $(BIN)/python -m pytest -s tests/slurm/test_soak.py

fuzz: $(STAMP)  ## 60 random programs through the clipping engine instead of 8
	DPSCALE_FUZZ_PROGRAMS=60 $(BIN)/python -m pytest -n 2 tests/test_clipping_fuzz.py

clean:  ## remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(PEERS) .pytest_cache .ruff_cache build *.egg-info
