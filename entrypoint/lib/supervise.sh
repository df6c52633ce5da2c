# The run from outside: GPU monitor and trainer side by side, signals, times, exit status.
# shellcheck shell=bash

# supervise COMMAND...: exits with the command's status
supervise() {
  local started=$SECONDS commit status caught=""
  LORA_STATE_DIR=$(mktemp -d "$node_local/run-XXXXXX") ||
    refuse "$node_local cannot be written (is it full?)" "export TMPDIR=FOLDER names another folder on this node"
  export LORA_STATE_DIR
  show_caches
  commit=$(image_fact commit)
  say "lora-train $(image_fact version) (${commit:0:12}) starts $(date +%FT%T%z) on $(uname -n)${SLURM_JOB_ID:+, job $SLURM_JOB_ID, task ${SLURM_PROCID:-0} of ${SLURM_NTASKS:-1}}"

  trainer_pid=""
  trap 'forward TERM' TERM HUP
  trap 'forward INT' INT
  trap 'forward USR1' USR1
  "$python" -m lora_train.gpu_monitor </dev/null >&2 &
  monitor=$!
  # A process group of its own: Ctrl-C reaches the group of the terminal, so the trainer gets the one
  # that is forwarded and not a second. If this shell is killed, the trainer is asked to stop.
  set -m
  if type -P setpriv >/dev/null; then set -- setpriv --pdeathsig TERM -- "$@"; fi
  # a question to the terminal would stop a process in the background for good
  "$@" </dev/null &
  trainer_pid=$!
  set +m
  [ -z "$caught" ] || forward "$caught"
  # `wait` also ends when a signal was handled; the trainer may take minutes to save
  while caught=""; do
    wait "$trainer_pid"
    status=$?
    [ -n "$caught" ] || break
  done

  stop_monitor
  rm -rf "$LORA_STATE_DIR"
  say "ended $(date +%FT%T%z) on $(uname -n) after $(duration $((SECONDS - started))): $(meaning "$status")"
  exit "$status"
}

forward() {
  caught=$1
  [ -z "$trainer_pid" ] || kill -s "$1" "$trainer_pid" 2>/dev/null
}

stop_monitor() {
  local tries
  kill -s TERM "$monitor" 2>/dev/null
  for ((tries = 0; tries < 30; tries++)); do
    kill -0 "$monitor" 2>/dev/null || break
    sleep 0.1
  done
  kill -s KILL "$monitor" 2>/dev/null
  wait "$monitor" 2>/dev/null
}

duration() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

meaning() {
  case $1 in
    0) printf 'done (exit status 0)' ;;
    2) printf 'refused, nothing was started (exit status 2)' ;;
    75) printf 'stopped on request, the same command goes on (exit status 75)' ;;
    85) printf 'stopped with a checkpoint, the job asks to be queued again (exit status 85)' ;;
    137) printf 'killed from outside (SIGKILL, exit status 137); often memory: #SBATCH --mem' ;;
    *) printf 'exit status %s' "$1" ;;
  esac
}
