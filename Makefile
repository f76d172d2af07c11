# The commands of daily work: `make help`. demo, test and the others first set up .venv, on a
# machine that has only Python 3.10+, and reuse it until constraints.txt or pyproject.toml change;
# where there is a C++ compiler they build the native library, and again when csrc/ changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu native wheel sanitize lint format type bench bench-gpu clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dcx-installed
NATIVE := $(VENV)/.dcx-native
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

# a GPU machine may be bare and offline: with PYTHON= given, the -gpu targets use it as it is
ifneq ($(filter command environment,$(origin PYTHON)),)
GPU_PYTHON := PYTHONPATH=. $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
GPU_STAMP := $(NATIVE)
endif
PARALLEL ?= -n auto --dist worksteal
ONLY ?=
RESULTS ?= benchmarks/results
COMMIT ?=

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | \
	    while IFS='|' read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done

demo: $(NATIVE) ## train a half-width VGG-19 on digits: dense, mask, sparse and thin in one table
	$(BIN)/dcx train --data digits --model vgg19 --width 0.5 --density 0.4 --selector cucb \
	    --compare mask,dense --out runs/demo

test: lint type $(NATIVE) ## lint, type-check, then every test that is neither slow nor needs a GPU
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-slow: $(NATIVE) ## the slow tests: whole networks, long runs
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu"

test-gpu: $(GPU_STAMP) ## on a GPU: kernel tests, sanitizer; ONLY=tests|sanitize, PYTHON=python3
	$(GPU_PYTHON) -m benchmarks.gpu_tests --only "$(ONLY)"

native: $(STAMP) ## build csrc/ in place: DCX_BUILD=auto|cpu|cuda|none, CUDA_HOME=, TORCH_CUDA_ARCH_LIST=
	$(BIN)/python csrc/libraries.py
	@touch $(NATIVE)

wheel: $(STAMP) ## a manylinux_2_28 wheel in dist/, audited; with CUDA if CUDA_HOME is set
	rm -rf build/wheel build/lib* build/bdist*
	DCX_BUILD=$(if $(CUDA_HOME),cuda,cpu) $(BIN)/python -m pip wheel --disable-pip-version-check \
	    --quiet --no-deps -w build/wheel .
	$(BIN)/python csrc/audit.py build/wheel/*.whl dist

sanitize: $(STAMP) ## the native tests on a library built with the address and undefined sanitizers
	$(BIN)/python csrc/libraries.py --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 DCX_LIBRARY_DIR=build/sanitize \
	    $(BIN)/python -m pytest tests/kernels/native -p no:cacheprovider

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff fix what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## mypy, strict
	$(BIN)/mypy

bench: $(NATIVE) ## measure operators and training steps; writes benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-only --ops-csv benchmarks/results/ops_cpu.csv
	$(BIN)/python -m benchmarks.native_ops
	$(BIN)/python -m benchmarks.train_step --densities 0.25,0.3,0.5,0.75,1.0

bench-gpu: $(GPU_STAMP) ## the same on a GPU; ONLY=ops|steps, PYTHON=python3, RESULTS=folder
	$(GPU_PYTHON) -m benchmarks.gpu_bench --only "$(ONLY)" --out "$(RESULTS)" --commit "$(COMMIT)"

clean: ## remove .venv, caches and build products (keeps runs/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f dcx_kernels/*.so dcx_kernels/_build.json
	find dcx_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip stays quiet but for the large downloads, one line each, so that the long wait shows progress;
# torch comes first, because the package's native library is compiled against it
$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "dcx_kernels needs Python >= 3.10 and '$(PYTHON)' is not; name another one:" \
	         "make PYTHON=python3.12 ..." >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	    if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear $(VENV); \
	    elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then \
	        $(PYTHON) -m virtualenv --quiet --clear $(VENV); \
	    else \
	        echo "'$(PYTHON)' cannot make virtual environments (it lacks ensurepip); on Debian and" \
	             "Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	    fi; \
	fi
	@echo "Installing into $(VENV); the first time this downloads about 2 GB: some minutes"
	@set -f; for what in torch "-e .[train,onnx,tensorboard,dev]"; do \
	    PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-input \
	        --progress-bar off -c constraints.txt $$what | \
	        while IFS= read -r line; do case "$$line" in \
	            *"("[0-9][0-9]*" MB)") echo "  $${line#"$${line%%[![:space:]]*}"}" ;; \
	            "Installing collected"*) echo "  unpacking" ;; \
	        esac; done; \
	done
	@touch $@

$(NATIVE): $(STAMP) $(SOURCES)
	@$(BIN)/python csrc/libraries.py
	@touch $@
