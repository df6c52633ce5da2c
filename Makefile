# lora-train from a checkout. `make train` needs a bare Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv

# a default of the image's build arguments, which the Dockerfile holds
default_of = $(shell sed -n 's/^ARG $(1)=//p' Dockerfile)

# torch is installed apart from the locked packages: its build depends on the machine
TORCH_VERSION ?= $(call default_of,TORCH_VERSION)
# auto: the build that the NVIDIA driver runs, cpu without one; or name it: cpu, cu126, cu130
TORCH_CUDA ?= auto
TORCH_INDEX ?= $(call default_of,TORCH_INDEX)
UV_VERSION := 0.13.9

# the image: its build has no driver to look at, so its torch is named
IMAGE ?= lora
SIF ?= lora.sif
image image-test sif sif-test: TORCH_CUDA := $(if $(filter auto,$(TORCH_CUDA)),$(call default_of,TORCH_CUDA),$(TORCH_CUDA))
BASE_IMAGE ?= $(call default_of,BASE_IMAGE)
# docker takes the base from a registry; or oci-archive, docker-archive with a file as BASE_IMAGE
BOOTSTRAP ?= docker

# a folder of the caller's that happens to be named like a package must not be imported instead
export PYTHONSAFEPATH := 1
export PYTHONNOUSERSITE := 1
# torch's threads wait asleep, not spinning: the tests start processes beside each other
export GOMP_SPINCOUNT ?= 10000
export TORCH_VERSION TORCH_CUDA TORCH_INDEX IMAGE SIF BASE_IMAGE BOOTSTRAP FROM

VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch-$(TORCH_VERSION)-$(TORCH_CUDA)
RUNTIME_STAMP := $(VENV)/.stamp-runtime
DEV_STAMP := $(VENV)/.stamp-dev
INSTALL := setup/install.sh
SHELL_FILES = $(wildcard .ci/run setup/*.sh tests/*/*.sh kernels/benchmarks/*.sh entrypoint/*.sh entrypoint/lib/*.sh \
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

.PHONY: test-image
test-image: $(DEV_STAMP)  ## build both images and run them: after tests/image/install_tools.sh, as root
	@$(VENV)/bin/pytest -rs tests/image $(ARGS)

.PHONY: test-slurm
test-slurm: $(DEV_STAMP) setup  ## start a Slurm here and run jobs: after tests/cluster/install_tools.sh, as root
	@$(VENV)/bin/pytest -rs tests/cluster $(ARGS)

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

.PHONY: build
build: image  ## the image with Docker or Podman (another name of image)

.PHONY: image
image:  ## build the image with Docker, Podman or Buildah: IMAGE=lora BASE_IMAGE=... TORCH_CUDA=cu126
	@setup/image.sh build

.PHONY: image-test
image-test:  ## run the image's own checks, as root and as another user, read-only
	@setup/image.sh test

.PHONY: sif
sif:  ## build lora.sif with Apptainer or Singularity; FROM=image takes the built image
	@setup/sif.sh build

.PHONY: sif-test
sif-test:  ## run the SIF's own checks
	@setup/sif.sh test

.PHONY: lint
lint: $(DEV_STAMP)  ## check style: ruff, docstrings against signatures, shell scripts, Dockerfile
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pydoclint --quiet lora_train kernels/lora_kernels
	$(VENV)/bin/shellcheck -x $(filter-out %/lib.sh entrypoint/lib/%,$(SHELL_FILES))  # follows them
	$(VENV)/bin/shfmt -i 2 -ci -d $(SHELL_FILES)
	$(VENV)/bin/hadolint Dockerfile

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
	@$(INSTALL) project $(VENV) --editable
	@touch $@

$(DEV_STAMP): requirements-dev.lock $(RUNTIME_STAMP)
	@$(INSTALL) packages $(VENV) requirements-dev.lock
	@touch $@
