# What image.sh and sif.sh share.
# shellcheck shell=bash

die() { # MESSAGE HINT
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

# find_tool NAME...: sets tool to the first that works here
find_tool() {
  for tool; do
    case $tool in
      # its client alone builds nothing
      docker) docker info >/dev/null 2>&1 && return ;;
      *) command -v "$tool" >/dev/null && return ;;
    esac
  done
  case $* in
    *apptainer*) die "neither apptainer nor singularity is on the PATH" \
      "module load apptainer (or singularity), or apt install apptainer; without them: make image" ;;
    *) die "none of $* works here" \
      "apt install podman, or start Docker; without them: make sif" ;;
  esac
}

# The commit that the image is built from; -dirty where files differ from it.
commit() {
  local hash
  hash=$(git rev-parse HEAD 2>/dev/null) || hash=unknown
  [ -z "$(git status --porcelain 2>/dev/null)" ] || hash+=-dirty
  printf '%s' "$hash"
}

version() { sed -n 's/^__version__ = "\(.*\)"/\1/p' lora_train/__init__.py; }

# save_image FILE: the built image $IMAGE as a docker-archive
save_image() {
  find_tool docker podman buildah
  case $tool in
    buildah) buildah push --quiet "$IMAGE" "docker-archive:$1" ;;
    *) "$tool" save --output "$1" "$IMAGE" ;;
  esac || die "there is no image $IMAGE" "make image"
}
