# Every target sets itself up: a virtual environment in .venv, made once and again only when the dependencies change;
# kernels are built again when their sources change.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
NATIVE := $(wildcard $(foreach kind,c cpp h,$(foreach under,*/native */native/* */*/native,platform/antiphon/$(under)/*.$(kind))))
EXTRAS := convert,coe,plan,operator,dev
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first Python on this machine that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

.PHONY: help demo test gpu attack fuzz lint types bench protos docs clean

help:  ## Show this list.
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1#/p' $(firstword $(MAKEFILE_LIST)) | awk -F'#' '{ printf "%-14s %s\n", $$1, $$2 }'

$(READY): pyproject.toml deploy/constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed and was not found on PATH; give one with PYTHON=..." >&2; exit 1; fi
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint deploy/constraints.txt torch
	@$(PIP) install --constraint deploy/constraints.txt --editable '.[$(EXTRAS)]'
	@$(PIP) install --constraint deploy/constraints.txt --editable '.[nixl]' || echo "No NIXL here: its links and tests are left out." >&2
	@touch $@

$(BUILT): $(READY) $(NATIVE)
	@$(BIN)/python -m antiphon.transport.native.build || echo "No native control channel: shared memory links will be slower." >&2
	@$(BIN)/python -m antiphon.coe.routing.native.build || echo "No native routing: decisions will be slower." >&2
	@$(BIN)/python -m antiphon.models.native.library >/dev/null || echo "No kernels: the slower torch path will serve." >&2
	@touch $@

demo: $(BUILT)  ## Serve the demo model on three pools, ask it a question, stop.
	@$(BIN)/antiphon serve -f deploy/examples/smollm2-pd-afd.yaml --http-port 0 --grpc-port 0 \
		--ask "What is the capital of France?"

test: $(BUILT)  ## Run all tests: in parallel first, then those that start clusters.
	@start=$$(date +%s); failed=""; \
	echo "== tests of parts, in parallel"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not cluster" -n 2 --dist worksteal || failed="$$failed parts"; \
	echo "== tests of whole systems, one by one"; \
	$(BIN)/python -m pytest -m cluster || failed="$$failed systems"; \
	took=$$(($$(date +%s) - start)); \
	if [ -n "$$failed" ]; then echo "make test: FAILED after $$took s in:$$failed"; exit 1; fi; \
	echo "make test: everything passed in $$took s"

attack: $(BUILT)  ## Try the known attacks on a running deployment, and list what came of each.
	@$(BIN)/python -m pytest tests/attack -n 0 --timeout 280

fuzz: $(BUILT)  ## Hundred thousand damaged inputs for each decoder of what peers send, and over all doors of a deployment.
	@ANTIPHON_FUZZ_EXAMPLES=100000 $(BIN)/python -m pytest tests/fuzz -n 2 --dist worksteal --timeout 0
	@ANTIPHON_ATTACK_INPUTS=100000 $(BIN)/python -m pytest tests/attack/test_mutations.py -n 0 -s --timeout 0

lint: $(READY)  ## Check style, format, types, the direction of imports and published vulnerabilities.
	@failed=""; \
	echo "== ruff check"; $(BIN)/ruff check --quiet . || failed="$$failed ruff-check"; \
	echo "== ruff format"; $(BIN)/ruff format --quiet --check . || failed="$$failed ruff-format"; \
	echo "== mypy"; $(BIN)/mypy || failed="$$failed mypy"; \
	echo "== import-linter"; $(BIN)/lint-imports || failed="$$failed import-linter"; \
	echo "== audit"; $(BIN)/python deploy/supply/audit.py || failed="$$failed audit"; \
	if [ -n "$$failed" ]; then echo "make lint: FAILED in:$$failed"; exit 1; fi; \
	echo "make lint: clean"

types: $(READY)  ## Check types alone.
	@$(BIN)/mypy

gpu: $(READY)  ## Test and measure on this machine's graphics card: under ten minutes, build/gpu/card.json.
	@$(BIN)/python -m antiphon.apps.bench.gpu --out build/gpu

bench: $(BUILT)  ## Measure transports, prefill, decode and mixed load.
	@$(BIN)/antiphon bench transports
	@$(BIN)/antiphon bench decode
	@$(BIN)/antiphon bench prefill

protos: $(READY)  ## Generate the code of protos/ again.
	@$(BIN)/python -m grpc_tools.protoc -I protos --python_out=platform --pyi_out=platform --grpc_python_out=platform \
		protos/antiphon/rpc/v1/*.proto

docs: $(READY)  ## Write the reference pages of deploy/docs again.
	@$(BIN)/python deploy/docs/reference.py

clean:  ## Remove the virtual environment, caches and builds.
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find platform operators tests -name __pycache__ -type d -prune -exec rm -rf {} +
