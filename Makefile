# Every target sets up what it needs first, in .venv; a second run starts at once. `make` alone lists the targets.
#
#   PYTHON=python3.12        the interpreter to set up with (3.11 to 3.14; found by itself otherwise)
#   ARGS="..."               passed on to what a target runs
#   TORCH_BUILD=+cu130 TORCH_INDEX=https://download.pytorch.org/whl/cu130
#                            a CUDA (or ROCm) build of torch instead of the CPU one
#   PIP_QUIET=0              shows what pip does

VENV          ?= .venv
TORCH_VERSION := 2.13.0
TORCH_BUILD   ?= +cpu
TORCH_INDEX   ?= https://download.pytorch.org/whl/cpu
ARGS          ?=
PYTHON        ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$python && break; done)

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install
PINS := pyproject.toml constraints.txt

# Pins hold for build tools too; newer versions of pip read the second name for those.
STEPS := $(VENV)/.torch $(VENV)/.cpu $(VENV)/.dev
$(STEPS): export PIP_CONSTRAINT       := constraints.txt
$(STEPS): export PIP_BUILD_CONSTRAINT := constraints.txt
$(STEPS): export PIP_QUIET            ?= 2
$(STEPS): export PIP_DISABLE_PIP_VERSION_CHECK := 1
$(STEPS): export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve bench test lint check gpu format setup clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS='	' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.cpu ## serve a small model, let it answer, measure it, print the matrix
	$(BIN)/mxn demo $(ARGS)

serve: $(VENV)/.cpu ## serve the default model on http://127.0.0.1:8000 (ARGS="MODEL --port 9000")
	$(BIN)/mxn serve $(ARGS)

bench: $(VENV)/.cpu ## run the serving workloads against mxn (ARGS="--help" for the options)
	$(BIN)/mxn bench $(ARGS)

# OpenMP's threads must not spin while they wait, else tests that run beside other processes crawl on a busy machine.
test: export GOMP_SPINCOUNT := 0
test: export OMP_NUM_THREADS ?= 2
test: $(VENV)/.dev ## run every test, those on real weights included
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## the same and the tests that need no torch
	$(BIN)/python -m pytest -m "not torch and not model and not slow" \
	  --ignore=tests/attention --ignore=tests/kernels --ignore=tests/runner $(ARGS)

# Takes the machine's own interpreter, whose torch and triton fit its chip; transformers and numpy are all it needs beside
# them, and nvidia-ml-py for energy. Results go to $OUT, else to benchmarks/results. ARGS=--dry-run: on a CPU, tiny shapes.
gpu: ## on a machine with a GPU: everything that needs one, in under eight minutes (JSON under OUT=folder)
	$(PYTHON) benchmarks/gpu.py $(ARGS)

format: $(VENV)/.dev ## format and fix what can be fixed by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.dev ## set up .venv for working on mxn

clean: ## remove .venv and all caches of tools (downloaded models stay: see `mxn models`)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- setting up

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "mxn needs Python 3.11 to 3.14, found $$(python3 --version 2>/dev/null || echo none)." \
	  "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments." \
	  "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and from PyTorch's own index, because the package index's build for Linux on x86-64 brings gigabytes of
# CUDA libraries. Where that index cannot be reached, pip goes on with what it is configured to use.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "installing torch $(TORCH_VERSION)$(TORCH_BUILD) (about 200 MB for the CPU build)"
	@$(PIP) "torch==$(TORCH_VERSION)$(TORCH_BUILD)" 2>/dev/null \
	  || $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch==$(TORCH_VERSION)"
	@touch $@

$(VENV)/.cpu: $(VENV)/.torch $(PINS)
	@echo "installing mxn"
	@$(PIP) -e ".[cpu]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(PINS)
	@echo "installing mxn with its development tools"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.cpu
