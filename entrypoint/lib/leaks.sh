# What leaks into a container from the user's shell and breaks the program there.
# shellcheck shell=bash

close_leaks() {
  # packages of another Python would be imported instead of the image's
  unset PYTHONPATH PYTHONHOME PYTHONSTARTUP
  export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
  # a compiler of the host's modules (CC=icc) that is not in here; Triton would call it
  if [ -n "${CC:-}" ] && ! type -P -- "${CC%% *}" >/dev/null; then unset CC; fi
  # an arbitrary uid has no name, and Python's getuser() fails without one
  USER=${USER:-$(id -un 2>/dev/null)} || USER=uid$(id -u)
  export USER
  export LOGNAME="${LOGNAME:-$USER}"
  # GPU numbers as nvidia-smi and Slurm count them
  export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
}
