#!/usr/bin/env bash
# Installs lora-train step by step for the Makefile, one short line per step; a step that fails
# shows pip's whole output.
#
#   install.sh venv PYTHON VENV       make the virtual environment
#   install.sh choose-torch           print the torch build for this machine, and why
#   install.sh torch VENV             install that build
#   install.sh packages VENV LOCK     install the locked packages, hashes checked
#   install.sh project VENV [--editable]   install this checkout
#
# Reads TORCH_VERSION, TORCH_CUDA (auto, cpu, cu126, cu130) and TORCH_INDEX from the environment.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }

die() { # MESSAGE [HINT]
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
  exit 1
}

# run_logged COMMAND...: quiet if it succeeds, its output in $log either way
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run_logged() { "$@" >"$log" 2>&1 </dev/null; }
show_log_and_die() {
  cat "$log" >&2
  die "$@"
}

make_venv() { # PYTHON VENV
  local python=$1 venv=$2 version
  command -v "$python" >/dev/null || die "no $python on this machine" \
    "install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"
  version=$("$python" -c 'import platform; print(platform.python_version())')
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is Python $version; lora-train needs 3.11 or newer" \
      "name a newer one: make setup PYTHON=python3.12"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python ($version) lacks its venv module" \
      "on Debian or Ubuntu: apt install python${version%.*}-venv"
  say "creating $venv (Python $version)"
  run_logged "$python" -m venv --clear "$venv" || show_log_and_die "cannot create $venv"
}

# Sets build and reason. A build for CUDA 12.6 runs with every driver from 525 on (CUDA's minor
# version compatibility), one for CUDA 13.0 from 580 on; torch 2.13 has no older builds.
choose_torch() {
  local listing cuda driver capability
  if [ "$TORCH_CUDA" != auto ]; then
    build=$TORCH_CUDA reason="TORCH_CUDA=$TORCH_CUDA"
    return
  fi
  build=cpu reason="no NVIDIA driver found"
  command -v nvidia-smi >/dev/null || return 0
  if ! listing=$(nvidia-smi 2>&1); then
    reason="nvidia-smi finds no working driver"
    return
  fi
  cuda=$(printf '%s\n' "$listing" | sed -nE 's/.*CUDA [A-Za-z ]*Version: *([0-9]+)\.[0-9]+.*/\1/p' | head -n 1)
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  reason="NVIDIA driver $driver runs CUDA ${cuda:-unknown}"
  if [ "${cuda:-0}" -ge 13 ]; then
    build=cu130
  elif [ "${cuda:-0}" -eq 12 ]; then
    build=cu126
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -n | tail -n 1)
    [ "${capability%%.*}" -lt 10 ] || die \
      "the NVIDIA driver $driver runs CUDA 12 only, but this GPU (compute capability $capability) needs a CUDA 13 build of torch" \
      "update the driver to 580 or newer"
  else
    die "the NVIDIA driver $driver (CUDA ${cuda:-unknown}) is too old for torch $TORCH_VERSION; it needs 525 or newer (CUDA 12)" \
      "update the driver, or train on the CPU: make setup TORCH_CUDA=cpu"
  fi
}

install_torch() { # VENV
  local venv=$1 size="about 3 GB" requirement
  local -a options=()
  choose_torch
  requirement="torch==$TORCH_VERSION+$build"
  # the only builds there are for macOS carry no build name
  [ "$(uname -s)" = Linux ] || requirement="torch==$TORCH_VERSION"
  if [ "$build" = cpu ]; then
    size="about 200 MB"
    options=(--no-deps) # the lock file holds them
  fi
  say "installing torch $TORCH_VERSION ($build, $size): $reason"

  # first from where pip is configured to look, so that a site's own copy works without internet
  if run_logged "$venv/bin/pip" install "${options[@]}" "$requirement"; then return; fi
  grep -q 'No matching distribution found for torch' "$log" ||
    show_log_and_die "cannot install $requirement"
  if run_logged "$venv/bin/pip" install "${options[@]}" --retries 2 "$requirement" \
    --extra-index-url "$TORCH_INDEX/$build"; then return; fi
  # the general package index holds one build of each version, for 2.13 the one for CUDA 13.0
  if [ "$build" = cu130 ] &&
    run_logged "$venv/bin/pip" install "torch==$TORCH_VERSION,!=$TORCH_VERSION+cpu"; then return; fi
  show_log_and_die "cannot install $requirement: neither pip's configured sources nor $TORCH_INDEX/$build gave it" \
    "name a copy of PyTorch's package index: make setup TORCH_INDEX=..."
}

install_packages() { # VENV LOCK
  local venv=$1 lock=$2
  say "installing $(grep -c '^[a-zA-Z0-9]' "$lock") packages from $lock"
  # --no-deps: the lock file is complete, and pip must not look for another torch
  run_logged "$venv/bin/pip" install --no-deps --require-hashes -r "$lock" ||
    show_log_and_die "cannot install $lock"
}

install_project() { # VENV [--editable]
  local venv=$1
  say "installing lora-train from this checkout"
  # the lock file's setuptools builds it: nothing more to fetch
  run_logged "$venv/bin/pip" install --no-deps --no-build-isolation "${@:2}" . ||
    show_log_and_die "cannot install this checkout"
  run_logged "$venv/bin/pip" check || show_log_and_die "the installed packages do not fit together"
}

case ${1:-} in
  venv) make_venv "$2" "$3" ;;
  choose-torch) choose_torch && printf '%s: %s\n' "$build" "$reason" ;;
  torch) install_torch "$2" ;;
  packages) install_packages "$2" "$3" ;;
  project) install_project "${@:2}" ;;
  *) die "unknown step '${1:-}'" ;;
esac
