# lora-train from a checkout. `make train` needs a bare Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv

# torch is installed apart from the locked packages: its build depends on the machine
TORCH_VERSION ?= 2.13.0
# auto: the build that the NVIDIA driver runs, cpu without one; or name it: cpu, cu126, cu130
TORCH_CUDA ?= auto
TORCH_INDEX ?= https://download.pytorch.org/whl
UV_VERSION := 0.13.9

# a folder of the caller's that happens to be named like a package must not be imported instead
export PYTHONSAFEPATH := 1
export PYTHONNOUSERSITE := 1
# torch's threads wait asleep, not spinning: the tests start processes beside each other
export GOMP_SPINCOUNT ?= 10000
export TORCH_VERSION TORCH_CUDA TORCH_INDEX

VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch-$(TORCH_VERSION)-$(TORCH_CUDA)
RUNTIME_STAMP := $(VENV)/.stamp-runtime
DEV_STAMP := $(VENV)/.stamp-dev
INSTALL := setup/install.sh
SHELL_FILES = $(wildcard .ci/run setup/*.sh kernels/benchmarks/*.sh entrypoint/*.sh entrypoint/lib/*.sh \
  slurm/*.slurm)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(RUNTIME_STAMP)  ## install into .venv, prepare the embedded model and data
	@$(VENV)/bin/python -m lora_train.quickstart

.PHONY: train
train: setup  ## train; ARGS='--factory NAME key=value ...', without ARGS the embedded example
	@$(VENV)/bin/lora-train $(ARGS)

.PHONY: test
test: $(DEV_STAMP) setup  ## run the tests; ARGS='-k NAME' goes to pytest
	@$(VENV)/bin/pytest $(ARGS)

.PHONY: test-gpu
test-gpu: $(DEV_STAMP) setup  ## on a GPU: the kernels against truth, then under compute-sanitizer
	@$(VENV)/bin/python -c "import torch; raise SystemExit(not torch.cuda.is_available())" \
	  || { echo "make test-gpu: torch sees no GPU" >&2; exit 2; }
	@$(VENV)/bin/pytest tests/ops tests/training tests/model $(ARGS)
	@kernels/benchmarks/memcheck.sh $(VENV)/bin/python

.PHONY: bench
bench: $(DEV_STAMP) setup  ## on a GPU: each operation, then whole steps beside the peers
	@$(VENV)/bin/python kernels/benchmarks/benchmark_operations.py
	@$(VENV)/bin/python kernels/benchmarks/benchmark_training_step.py

.PHONY: tune
tune: $(DEV_STAMP) setup  ## on a GPU: write its launch tables
	@$(VENV)/bin/python kernels/benchmarks/tune.py

.PHONY: lint
lint: $(DEV_STAMP)  ## check style: ruff, docstrings against signatures, shell scripts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pydoclint --quiet lora_train kernels/lora_kernels
	$(VENV)/bin/shellcheck $(SHELL_FILES)

.PHONY: typecheck
typecheck: $(DEV_STAMP)  ## check types: mypy
	$(VENV)/bin/mypy

.PHONY: lock
lock: build/uv/bin/uv  ## resolve requirements*.in again into requirements*.lock, with hashes
	@for name in requirements requirements-dev; do \
	  build/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	    --generate-hashes --no-annotate --override setup/no-torch.txt \
	    --custom-compile-command "make lock" \
	    $$name.in --output-file $$name.lock || exit 1; \
	done

.PHONY: clean
clean:  ## remove what tools and builds leave; keeps .venv and .lora_cache
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find lora_train kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

build/uv/bin/uv:
	@$(PYTHON) -m venv build/uv
	@build/uv/bin/pip install --quiet uv==$(UV_VERSION)

$(VENV_STAMP):
	@$(INSTALL) venv $(PYTHON) $(VENV)
	@touch $@

$(TORCH_STAMP): | $(VENV_STAMP)
	@$(INSTALL) torch $(VENV)
	@rm -f $(VENV)/.stamp-torch-*
	@touch $@

$(RUNTIME_STAMP): requirements.lock pyproject.toml $(TORCH_STAMP)
	@$(INSTALL) packages $(VENV) requirements.lock
	@$(INSTALL) project $(VENV)
	@touch $@

$(DEV_STAMP): requirements-dev.lock $(RUNTIME_STAMP)
	@$(INSTALL) packages $(VENV) requirements-dev.lock
	@touch $@
