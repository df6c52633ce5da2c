#!/usr/bin/env bash
# Build and check lora.sif, with apptainer or singularity.
#
#   sif.sh build    Singularity.def -> $SIF; with FROM=image from the built image $IMAGE
#   sif.sh test     the SIF's own checks, and what it tells of itself
#
# Reads SIF, BOOTSTRAP, BASE_IMAGE, TORCH_VERSION, TORCH_CUDA, TORCH_INDEX (defaults: Dockerfile, through make);
# SIF_OPTIONS='...' goes to `apptainer build`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=setup/lib.sh
. setup/lib.sh

build() {
  local name builder can
  local -a options=() more
  find_tool apptainer singularity
  builder=$tool
  can=$("$builder" build --help 2>&1)
  [[ $can == *--build-arg* ]] ||
    die "$("$builder" --version) cannot fill in a definition file (no --build-arg)" \
      "module load a newer one (Apptainer 1.2, SingularityCE 4), or build elsewhere and copy the file"
  # zstd packs and unpacks in a third of gzip's time; SingularityCE has no choice
  if [[ $can == *--mksquashfs-args* ]]; then
    options+=(--mksquashfs-args "-comp zstd")
  fi
  if [ "${FROM:-}" = image ]; then
    # global: the trap runs after this function
    archive=$(mktemp --suffix=.tar "${TMPDIR:-/tmp}/lora-XXXXXX")
    trap 'rm -f "$archive"' EXIT
    save_image "$archive"
    export BOOTSTRAP=docker-archive BASE_IMAGE=$archive
  fi
  for name in BOOTSTRAP BASE_IMAGE TORCH_VERSION TORCH_CUDA TORCH_INDEX; do
    options+=(--build-arg "$name=${!name}")
  done
  read -ra more <<<"${SIF_OPTIONS:-}"
  "$builder" build --force "${options[@]}" --build-arg "COMMIT=$(commit)" "${more[@]}" "$SIF" Singularity.def
}

check() {
  find_tool apptainer singularity
  [ -e "$SIF" ] || die "there is no $SIF" "make sif"
  "$tool" test "$SIF"
  "$tool" inspect "$SIF"
}

case ${1:-} in
  build) build ;;
  test) check ;;
  *) die "sif.sh: build or test, not '${1:-}'" "make sif" ;;
esac
