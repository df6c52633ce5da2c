#!/usr/bin/env bash
# The one recipe of the image, run inside it by Dockerfile and Singularity.def; leaves no cache behind.
#
#   install_image.sh packages    what changes seldom: compiler, Python, torch, the locked packages
#   install_image.sh project     this checkout, the embedded model and data, compiled kernels, image.json
#
# Reads TORCH_VERSION, TORCH_CUDA and TORCH_INDEX; for image.json also COMMIT and BASE_IMAGE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly image=/opt/lora
readonly venv=$image/venv
# gcc, C library and Python headers: Triton compiles its launcher at run time
readonly system_packages=(ca-certificates gcc libc6-dev libpython3-dev python3 python3-venv)
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
umask 022
# what libraries leave in the folder for temporary files goes with it
export TMPDIR=$image/tmp
mkdir -p "$TMPDIR"
trap 'rm -rf "$TMPDIR"' EXIT

install_system_packages() {
  local package
  local -a missing=()
  for package in "${system_packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
      missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
  apt-get clean
  rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
}

install_packages() {
  install_system_packages
  setup/install.sh venv python3 "$venv"
  setup/install.sh torch "$venv"
  setup/install.sh packages "$venv" requirements.lock
  remove_unused
}

# What the packages bring that no training reads; CONTRIBUTING.md says how much each is.
remove_unused() {
  local packages cuda
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
  cuda=$("$venv/bin/python" -c 'import torch; print((torch.version.cuda or "none").replace(".", ""))')
  find "$packages" -name '*.a' -delete
  # 280 of 460 MB are symbols; Triton reads the whole file at every start
  strip --strip-unneeded "$packages/triton/_C/libtriton.so"
  find "$packages"/{pandas,sympy,pyarrow,networkx} -depth -type d -name tests -exec rm -rf {} +
  rm -rf "$packages"/torch/{include,test} "$packages"/torch/bin/{protoc*,test_*} "$packages"/pyarrow/include
  # kernels for the CUDA of other torch builds
  find "$packages/bitsandbytes" -name 'libbitsandbytes_cuda*' ! -name "*cuda$cuda.so" -delete
  find "$packages/bitsandbytes" \( -name '*rocm*.so' -o -name '*xpu*.so' \) -delete
}

install_project() {
  local file
  setup/install.sh project "$venv"
  "$venv/bin/python" -m lora_train.quickstart "$venv/share/lora-train/quickstart"
  "$venv/bin/python" -m lora_train.precompile "$image/triton_cache"

  cp -R entrypoint "$image/"
  mkdir -p "$image/bin"
  for file in lora-train nemo hf; do ln -sfn ../entrypoint/entrypoint.sh "$image/bin/$file"; done
  # nothing is installed from here on
  "$venv/bin/python" -m pip uninstall --quiet --yes pip
  "$venv/bin/python" setup/describe_image.py >"$image/image.json"
  rm -rf "$image/src"
  # any uid reads it, whatever the umask of the checkout was; only here: in an image made of layers, a
  # changed mode is a second copy
  chmod -R a+rX,go-w "$image/entrypoint"
}

case ${1:-} in
  packages) install_packages ;;
  project) install_project ;;
  *)
    echo "install_image.sh: packages or project, not '${1:-}'" >&2
    exit 2
    ;;
esac
