#!/usr/bin/env bash
# Build and check the Docker image, with whichever of docker, podman and buildah is there.
#
#   image.sh build    Dockerfile -> $IMAGE
#   image.sh test     the image's own checks, as root, and as another uid with a read-only root
#
# Reads IMAGE, BASE_IMAGE, TORCH_VERSION, TORCH_CUDA, TORCH_INDEX (defaults: Dockerfile, through make);
# IMAGE_OPTIONS='...' goes to the build, RUN_OPTIONS='...' to the runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=setup/lib.sh
. setup/lib.sh

build() {
  local name
  local -a options=() more
  find_tool docker podman buildah
  for name in BASE_IMAGE TORCH_VERSION TORCH_CUDA TORCH_INDEX; do
    options+=(--build-arg "$name=${!name}")
  done
  read -ra more <<<"${IMAGE_OPTIONS:-}"
  "$tool" build "${options[@]}" --build-arg "COMMIT=$(commit)" --build-arg "VERSION=$(version)" "${more[@]}" --tag "$IMAGE" .
}

run_checks() { # HOW OPTIONS...
  local -a more
  printf -- '-- %s\n' "$1"
  read -ra more <<<"${RUN_OPTIONS:-}"
  "$tool" run --rm "${more[@]}" "${@:2}" "$IMAGE" /opt/lora/entrypoint/image_test.sh
}

check() {
  find_tool docker podman
  "$tool" image inspect "$IMAGE" >/dev/null 2>&1 || die "there is no image $IMAGE" "make image"
  run_checks 'as root'
  run_checks 'as uid 12345, with a read-only root' --user 12345:12345 --read-only --tmpfs /tmp
}

case ${1:-} in
  build) build ;;
  test) check ;;
  *) die "image.sh: build or test, not '${1:-}'" "make image" ;;
esac
