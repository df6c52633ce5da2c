# Cache folders away from $HOME, which is small on clusters and shared by all of a user's jobs.
#
# The base is LORA_CACHE_DIR, else project or scratch storage where it can be told, else .lora_cache in
# the current folder. What many small files are written to, or locked, goes to the node's own disk.
# shellcheck shell=bash

# names that sites give the variable of their project or scratch storage (NERSC, TACC, CSCS, Pawsey,
# Sherlock, CINECA, the Alliance); PROJECT and WORK may be anything, so only a folder counts
readonly storage_variables=(PROJECT WORK SCRATCH PSCRATCH MYSCRATCH GROUP_SCRATCH CINECA_SCRATCH SCRATCHDIR)
# room on the node's own disk below which it is not used: Apptainer's --containall gives 64 MiB
readonly node_local_kib=$((512 * 1024))

# set_caches: export every unset cache variable; `rows` keeps what show_caches tells
set_caches() {
  local old_token=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/huggingface/token
  rows=()
  choose_base
  drop_missing_tmpdir
  choose_node_local
  export LORA_CACHE_DIR=$base
  if [ ! -d "${HOME:-}" ]; then
    export HOME=$node_local/home
    mkdir -p "$HOME"
  fi

  # a login made before the caches moved stays valid, unless there is a newer one
  if [ -z "${HF_HOME:-}${HF_TOKEN:-}${HF_TOKEN_PATH:-}" ] && [ -r "$old_token" ] &&
    [ ! -O "$base/huggingface/token" ]; then
    export HF_TOKEN_PATH=$old_token
  fi
  # hub, datasets, xet, assets, modules and token follow HF_HOME; NeMo's data sets and models NEMO_HOME
  default HF_HOME "$base/huggingface"
  default TORCH_HOME "$base/torch"
  default TORCH_EXTENSIONS_DIR "$base/torch_extensions"
  default NEMO_HOME "$base/nemo"
  default MPLCONFIGDIR "$base/matplotlib"
  default WANDB_CACHE_DIR "$base/wandb/cache"
  default WANDB_CONFIG_DIR "$base/wandb/config"
  default WANDB_DATA_DIR "$base/wandb/data"
  default XDG_CACHE_HOME "$base/xdg"
  default TRITON_CACHE_DIR "$node_local/triton"
  default TORCHINDUCTOR_CACHE_DIR "$node_local/inductor"
  default CUDA_CACHE_PATH "$node_local/cuda"
  default TMPDIR "$node_local/tmp"
  mkdir -p "$TMPDIR" "$TRITON_CACHE_DIR" 2>/dev/null
}

# default NAME PATH: export NAME=PATH unless the user set it; note a row of the table
default() {
  local whose=""
  if [ -n "${!1:-}" ]; then whose="(set by you)"; else export "$1=$2"; fi
  rows+=("$1"$'\t'"${!1}"$'\t'"$whose")
}

# Sets base and base_why.
choose_base() {
  local name folder
  if [ -n "${LORA_CACHE_DIR:-}" ]; then
    base=$(absolute "$LORA_CACHE_DIR") base_why=LORA_CACHE_DIR
    # a question such as preflight is answered all the same
    is_usable "$base" || [ "$is_run" = no ] || refuse "LORA_CACHE_DIR=$LORA_CACHE_DIR cannot be written: $why" \
      "export LORA_CACHE_DIR=FOLDER names one that can$(unbound "$base")"
    return
  fi
  for name in "${storage_variables[@]}"; do
    folder=${!name:-}
    case $folder in
      "${HOME:-/nonexistent}" | "${HOME:-/nonexistent}"/*) continue ;;
      /*) ;;
      *) continue ;;
    esac
    base_why="\$$name"
    if is_storage "$folder"; then return; fi
    say "$name=$folder is not used for caches: $why$(unbound "$folder")"
  done
  base_why="storage of this site"
  for folder in "/ibex/user/$USER" "/scratch/users/$USER" "/scratch/$USER" \
    "/scratch/${SLURM_JOB_ACCOUNT:-none}" "/project/${SLURM_JOB_ACCOUNT:-none}" "/work/$USER" \
    "/lustre/scratch/$USER" "/gpfs/scratch/$USER"; do
    if is_storage "$folder"; then return; fi
  done
  base=$PWD/.lora_cache base_why="no project or scratch storage was recognized"
  if is_usable "$base"; then return; fi
  base=${TMPDIR:-/tmp}/lora-train-$(id -u)/cache base_why="the current folder cannot be written: lost with the node"
  is_usable "$base" || [ "$is_run" = no ] ||
    refuse "no folder for caches: neither $PWD nor ${base%/lora-train-*} can be written" \
      "export LORA_CACHE_DIR=FOLDER names one that can"
}

# is_storage FOLDER: whether it is there and takes the caches; sets base
is_storage() {
  why="there is no such folder"
  [ -d "$1" ] || return 1
  base=$1/lora-train
  # what a group shares holds a folder for each of its users
  if [ ! -O "$1" ] && [[ $1 != *"$USER"* ]]; then base=$1/$USER/lora-train; fi
  is_usable "$base"
}

# A TMPDIR of the node that is not in the container.
drop_missing_tmpdir() {
  [ -n "${TMPDIR:-}" ] && [ ! -d "$TMPDIR" ] || return 0
  mkdir -p "$TMPDIR" 2>/dev/null && return
  say "TMPDIR=$TMPDIR is not there$(unbound "$TMPDIR"); another folder is used"
  unset TMPDIR
}

# Sets node_local: the user's own folder on this node's disk, else one in the base.
choose_node_local() {
  local parent folder free
  for parent in "${TMPDIR:-}" "${SLURM_TMPDIR:-}" /tmp; do
    [ -n "$parent" ] && [ -d "$parent" ] && [ -w "$parent" ] || continue
    free=$(timeout 5 df -Pk -- "$parent" 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ "${free:-0}" -ge "$node_local_kib" ] || continue
    folder=$parent/lora-train-$(id -u)
    mkdir -m 700 "$folder" 2>/dev/null
    # /tmp is everybody's: a folder of that name may be another user's
    if [ -L "$folder" ] || [ ! -O "$folder" ] || [ ! -w "$folder" ]; then
      folder=$(mktemp -d "$parent/lora-train-XXXXXX" 2>/dev/null) || continue
    fi
    if runs_code "$folder"; then
      node_local=$folder
      return
    fi
  done
  node_local=$base/node/$(uname -n)
  mkdir -p "$node_local" 2>/dev/null
}

# runs_code FOLDER: false where it is mounted noexec; Triton loads a library from its cache
runs_code() {
  local probe status
  probe=$(mktemp "$1/.probe-XXXXXX" 2>/dev/null) || return 1
  printf '#!/bin/sh\n' >"$probe"
  chmod u+x "$probe"
  "$probe" 2>/dev/null
  status=$?
  rm -f "$probe"
  return "$status"
}

# is_usable FOLDER: whether it can be made and written to, without making it; why not is left in `why`
is_usable() {
  local folder probe
  folder=$(existing "$1")
  probe=$(mktemp "$folder/.probe-XXXXXX" 2>&1) || {
    why="${probe##*: } ($folder)"
    return 1
  }
  rm -f "$probe"
}

# absolute PATH: from the current folder; a leading ~ is the home, also where no shell has seen it
absolute() {
  case $1 in
    /*) printf '%s' "$1" ;;
    '~' | '~/'*) printf '%s' "${HOME:-}${1:1}" ;;
    *) printf '%s/%s' "$PWD" "$1" ;;
  esac
}

# existing PATH: the nearest folder above that is there
existing() {
  local folder
  folder=$(absolute "$1")
  while [ -n "$folder" ] && [ ! -e "$folder" ]; do folder=${folder%/*}; done
  printf '%s' "${folder:-/}"
}

# bind_option FOLDER: what shows a folder of the node in this container, if it is not there
bind_option() {
  [ ! -d "$1" ] || return 0
  if [ -n "${APPTAINER_CONTAINER:-${SINGULARITY_CONTAINER:-}}" ]; then
    printf -- '--bind %q' "$1"
  elif [ -e /.dockerenv ] || [ -e /run/.containerenv ]; then
    printf -- '-v %q:%q' "$1" "$1"
  fi
}

# unbound FOLDER: the same as a note behind a message
unbound() {
  local option
  option=$(bind_option "$1")
  printf '%s' "${option:+ (not in this container: add $option)}"
}

# One row for each variable, or one line for all with LORA_QUIET=1 and on every process but the first.
show_caches() {
  local row name path whose previous="" place=""
  local short='%s, %s and %s inodes free'
  if [ -n "${LORA_QUIET:-}" ] || [ "${RANK:-${SLURM_PROCID:-0}}" != 0 ]; then
    say "caches: $base ($(columns "$base" "$short")); on the node: $node_local ($(columns "$node_local" "$short"))"
    return
  fi
  say "caches in $base ($base_why)"
  {
    printf '  %-23s  %-8s %8s %8s  %s\n' variable 'file sys' free inodes path
    for row in "${rows[@]}" "${HF_TOKEN_PATH:+HF_TOKEN_PATH$'\t'$HF_TOKEN_PATH$'\t'(your login)}"; do
      [ -n "$row" ] || continue
      IFS=$'\t' read -r name path whose <<<"$row"
      # the same file system mostly: asked once for each folder that holds several
      if [ "${path%/*}" != "$previous" ]; then place=$(columns "$path" '%-8s %8s %8s'); fi
      previous=${path%/*}
      printf '  %-23s  %s  %s\n' "$name" "$place" "$path${whose:+ $whose}"
    done
  } >&2
}

# df_of FOLDER: file system, free bytes and free inodes of where it is or will be
df_of() {
  # a dead network file system must not hold up the run
  timeout 5 df --output=fstype,avail,iavail -B1 -- "$(existing "$1")" 2>/dev/null | tail -n 1
}

# columns FOLDER FORMAT: file system, free bytes and free inodes, through printf
columns() {
  local type free inodes
  read -r type free inodes <<<"$(df_of "$1")"
  # shellcheck disable=SC2059
  printf "$2" "${type:-?}" "$(human iec "${free:-}")" "$(human si "${inodes:-}")"
}

# human UNITS NUMBER; some file systems count no inodes and say `-`
human() {
  case $2 in
    *[!0-9]* | '') printf -- '-' ;;
    *) numfmt --to="$1" "$2" ;;
  esac
}
