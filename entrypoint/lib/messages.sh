# Messages of the entrypoint, all on stderr: stdout belongs to the program.
# shellcheck shell=bash

say() { printf 'entrypoint: %s\n' "$*" >&2; }

# refuse MESSAGE HINT: wrong input, nothing was started
refuse() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

# image_fact NAME: a line of image.json, which tells what the image was made from
image_fact() { sed -nE "s/^ *\"$1\": \"(.*)\",?\$/\1/p" "$image/image.json" 2>/dev/null; }
