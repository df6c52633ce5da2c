# An NVIDIA driver older than the image's CUDA: its compatibility libraries, and only then. On a newer
# driver they would be the older of the two, and CUDA fails to start (errors 803 and 804).
# shellcheck shell=bash

# the oldest drivers that CUDA's minor version compatibility covers
readonly oldest_driver_cuda12=525 oldest_driver_cuda13=580

prefer_compat_libraries() {
  local compat=/usr/local/cuda/compat driver cuda oldest brought
  [ -e "$compat/libcuda.so.1" ] || return 0
  driver=$(driver_version)
  [ -n "$driver" ] || return 0
  cuda=$(image_fact cuda)
  case $cuda in
    12*) oldest=$oldest_driver_cuda12 ;;
    13*) oldest=$oldest_driver_cuda13 ;;
    *) return 0 ;;
  esac
  [ "${driver%%.*}" -lt "$oldest" ] || return 0
  # libcuda.so.560.35.05: as old as the driver itself they would help nothing
  brought=$(readlink -f "$compat/libcuda.so.1")
  brought=${brought##*.so.}
  [ "${brought%%.*}" -ge "$oldest" ] 2>/dev/null || return 0
  export LD_LIBRARY_PATH=$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  say "NVIDIA driver $driver is older than $oldest, which CUDA $cuda needs: using the libraries in $compat"
}

driver_version() {
  local version=""
  if [ -r /proc/driver/nvidia/version ]; then
    version=$(sed -nE 's/.*Kernel Module +(for [^ ]+ +)?([0-9]+\.[0-9.]+).*/\2/p' /proc/driver/nvidia/version)
  elif type -P nvidia-smi >/dev/null; then
    version=$(timeout 10 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  fi
  case $version in [0-9]*) printf '%s' "$version" ;; esac
}
