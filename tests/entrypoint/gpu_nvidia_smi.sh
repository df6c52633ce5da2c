#!/bin/sh
# Stands in for nvidia-smi: -L, and --query-gpu=... -i LIST -lms MS as an endless loop.
# FAKE_MODE: ok, nodriver, na, hang, die (after 3 samples), old (a driver before 535), mig
# FAKE_UUIDS: one word a GPU. FAKE_PID: file for the process id of the endless loop.
mode=${FAKE_MODE:-ok} query='' only='' milliseconds='' is_list=''
while [ $# -gt 0 ]; do
  case $1 in
    -L) is_list=1 ;;
    --query-gpu=*) query=${1#*=} ;;
    --format=csv,noheader,nounits) ;;
    -i) only=,$2, && shift ;;
    -lms) milliseconds=$2 && shift ;;
    *) echo "Invalid combination of input arguments." && exit 1 ;;
  esac
  shift
done

case $mode in
  nodriver)
    echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    echo
    exit 9
    ;;
  hang) exec sleep 600 ;;
esac

if [ -n "$is_list" ]; then
  index=0
  for uuid in ${FAKE_UUIDS:-GPU-aaaa GPU-bbbb}; do
    echo "GPU $index: NVIDIA A100-SXM4-80GB (UUID: $uuid)"
    if [ "$mode" = mig ]; then
      echo "  MIG 1g.10gb     Device  0: (UUID: MIG-1-$uuid)"
      echo "  MIG 1g.10gb     Device  1: (UUID: MIG-2-$uuid)"
    fi
    index=$((index + 1))
  done
  exit 0
fi

value() { # FIELD: a number that differs from sample to sample is in memory.used
  case $1:$mode in
    timestamp:*) date '+%Y/%m/%d %H:%M:%S.000' ;;
    index:*) echo $index ;;
    utilization.gpu:na | utilization.gpu:mig) echo '[N/A]' ;;
    power.draw:na) echo '[Not Supported]' ;;
    utilization.gpu:*) echo 97 ;;
    memory.used:*) echo $sample ;;
    memory.total:*) echo 81920 ;;
    power.draw:*) echo 301.50 ;;
    temperature.gpu:*) echo 61 ;;
    clocks.current.sm:*) echo 1410 ;;
    clocks_throttle_reasons.active:*) echo 0x0000000000000004 ;;
    clocks_event_reasons.active:old) return 1 ;;
    clocks_event_reasons.active:*) echo 0x0000000000000001 ;;
    uuid:*) echo "$uuid" ;;
    *) return 1 ;;
  esac
}

[ -z "${FAKE_PID:-}" ] || echo $$ >"$FAKE_PID"
sleeping=
trap '[ -z "$sleeping" ] || kill "$sleeping"; exit 143' TERM
sample=0
while :; do
  index=0
  for uuid in ${FAKE_UUIDS:-GPU-aaaa GPU-bbbb}; do
    case $only in
      *,$index,*)
        row=
        for field in $(echo "$query" | tr , ' '); do
          value "$field" >/dev/null || {
            printf 'Field "%s" is not a valid field to query.\n\n' "$field"
            exit 2
          }
          row="$row${row:+, }$(value "$field")"
        done
        echo "$row"
        ;;
    esac
    index=$((index + 1))
  done
  sample=$((sample + 1))
  [ "$mode:$sample" != die:3 ] || exit 255
  sleep "$((milliseconds / 1000)).$(printf %03d $((milliseconds % 1000)))" &
  sleeping=$!
  wait $sleeping
done
