#!/usr/bin/env bash
# What runs before Python: cache folders, GPU monitor, then the trainer.
#
#   entrypoint.sh --max-steps 250              train (options, KEY=VALUE or nothing)
#   entrypoint.sh preflight | generate | ...   a sub-command of lora-train
#   entrypoint.sh bash                         any program of the image, with the caches set
#
# Called as `lora-train` or `nemo` (symbolic links in the image's bin/, first on its PATH) it does the
# same, so `apptainer exec`, `srun --container-image` and `run` behave alike.
#
# Only variables that are unset are set. No `set -e`: what merely serves a run must not end it.
set -uo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly here image=${here%/*}
readonly trainer=$image/venv/bin/lora-train
readonly python=$image/venv/bin/python
# shellcheck source=entrypoint/lib/messages.sh
. "$here/lib/messages.sh"
# shellcheck source=entrypoint/lib/leaks.sh
. "$here/lib/leaks.sh"
# shellcheck source=entrypoint/lib/caches.sh
. "$here/lib/caches.sh"
# shellcheck source=entrypoint/lib/driver.sh
. "$here/lib/driver.sh"
# shellcheck source=entrypoint/lib/kernels.sh
. "$here/lib/kernels.sh"
# shellcheck source=entrypoint/lib/supervise.sh
. "$here/lib/supervise.sh"

# Whether the words train: not a sub-command, and not a question that is answered at once.
trains() {
  local word
  case ${1:-} in
    '' | -* | *=* | train | nemo) ;;
    *) return 1 ;;
  esac
  for word; do
    case $word in
      -h | --help | --version | --dry-run | --dryrun) return 1 ;;
    esac
  done
}

# What every program of the image gets.
prepare() {
  close_leaks
  set_caches
  prefer_compat_libraries
  seed_kernels
}

# Before the trainer can save anything: stop, and say that the same command may come again. (As process 1
# of a container it would not end by itself.)
trap 'exit 75' TERM INT USR1 HUP
case ${0##*/} in
  entrypoint.sh) ;;
  # called through a link: the program that it is named after
  *) set -- "${0##*/}" "$@" ;;
esac
case ${1:-} in
  lora-train) shift ;;
  # sbatch: ours, also where a site binds Slurm's own into its containers
  '' | -* | *=* | nemo | sbatch) ;;
  *)
    is_run=no
    # a program of the image; what is none, is a sub-command or a mistake that the trainer explains
    if program=$(PATH=$image/venv/bin:${PATH#"$image/bin:"} type -P -- "$1"); then
      shift
      prepare
      exec "$program" "$@"
    fi
    ;;
esac
if trains "$@"; then is_run=yes; else is_run=no; fi
prepare
# one of several processes that torchrun starts on a node is watched; so is none that a run starts
if [ "$is_run" = yes ] && [ "${LOCAL_RANK:-0}" = 0 ] && [ ! -d "${LORA_STATE_DIR:-}" ]; then
  supervise "$trainer" "$@"
fi
exec "$trainer" "$@"
