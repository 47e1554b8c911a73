# The front door. `dvc repro` is the make of the pipeline itself; this sets up what it needs, once.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
GROUPS ?= cluster dev
UV_VERSION := 0.13.8
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: setup repro test lint format bench lock seeds ablations clean

repro: setup  ## rebuild whatever is not up to date, then see reports/index.html; RUNNER=threads|dask|ray: by Prefect
	$(if $(filter threads dask ray,$(RUNNER)),tessera cluster $(RUNNER) --) dvc repro
	@echo "Report: $(CURDIR)/reports/index.html"

test: setup  ## the whole test suite, a file at a time in each of two processes
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

lint: setup  ## style, import order, types
	ruff check .
	ruff format --check .
	pyright

format: setup
	ruff check --fix .
	ruff format .

bench: setup  ## speed against peers, as ratios measured in one run
	python -m benchmarks

# Each group's lock holds the base as well. In alphabetical order gpu comes last: its faiss replaces the base's.
LOCKS := $(if $(GROUPS),$(patsubst %,requirements-%.lock,$(sort $(GROUPS))),requirements.lock)
STAMP := $(VENV)/.installed$(subst $() ,,$(patsubst %,-%,$(sort $(GROUPS))))
# Compiled here: where PYTHONDONTWRITEBYTECODE is set, every process would compile all that it imports, seconds of torch.
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps

setup: $(STAMP)  ## the locked environment in .venv; `make setup GROUPS="cluster dev gpu"` adds one

# The locks decide the environment: any change of them reinstalls, nothing else does.
$(STAMP): $(LOCKS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(foreach lock,$(LOCKS),$(INSTALL) --require-hashes -r $(lock) &&) true
	$(if $(filter gpu,$(GROUPS)),$(BIN)/uv pip uninstall --quiet --python $(BIN)/python faiss-cpu)
	$(if $(filter gpu,$(GROUPS)),$(INSTALL) --require-hashes --reinstall-package faiss-gpu-cu12 -r requirements-gpu.lock)
	$(INSTALL) --no-build-isolation -e .
	touch $@

UV_COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --override requirements.overrides
lock: setup  ## resolve requirements*.in again; `make lock UPGRADE=--upgrade` takes newer versions
	$(UV_COMPILE) $(UPGRADE) requirements.in -o requirements.lock
	$(UV_COMPILE) $(UPGRADE) -c requirements.lock requirements-dev.in -o requirements-dev.lock
	$(UV_COMPILE) $(UPGRADE) -c requirements.lock requirements-cluster.in -o requirements-cluster.lock
	$(UV_COMPILE) $(UPGRADE) -c requirements.lock --override requirements-gpu.overrides \
		requirements-gpu.in -o requirements-gpu.lock

seeds: setup  ## the default run's figures over three seeds, into reports/seeds.json
	python -m benchmarks.seeds

ablations: setup  ## a paper's ablation tables, small, from the caches that are there: `make ablations METHOD=groupvit`
	python -m benchmarks.ablate $(METHOD) $(ARGS)

clean:  ## remove what can be made again; downloads, and the tables of rows to retry and to reject, stay
	test ! -d data/store || find data/store -mindepth 1 -maxdepth 1 ! -name download ! -name retries ! -name decisions -exec rm -rf {} +
	rm -rf data/checkpoints logs models/* reports/index.html reports/figures
