#!/usr/bin/env bash
# What the tests of the image need on a Debian machine, as root: Podman, Apptainer, a user, a base image.
#
#   install_tools.sh    installs what is missing; prints "skipped: REASON" where that cannot be done here
#
# Leaves in /var/tmp/lora-image-tests: base.tar, base.oci.tar, containers.conf, and links in bin/.
set -euo pipefail

readonly folder=/var/tmp/lora-image-tests
readonly apptainer=/opt/lora-image-tests/apptainer
export DEBIAN_FRONTEND=noninteractive

skip() {
  printf 'skipped: %s\n' "$*" >&2
  exit 0
}

[ "$(id -u)" = 0 ] || skip "the tools of the image's tests are installed by root"
command -v apt-get >/dev/null || skip "they are installed from Debian's packages"

install() {
  local package
  local -a missing=()
  for package; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
      missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  apt-get -qq update || skip "apt-get update fails"
  apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
    skip "apt-get cannot install ${missing[*]}"
}

# Debian has Apptainer in its unstable release only, for a newer C library than an older release's: it gets
# a folder and a C library of its own there.
install_apptainer() {
  local work uri loader libraries elf
  local -a apt packages
  command -v apptainer >/dev/null && return
  [ -x "$apptainer/usr/bin/apptainer" ] && return
  install squashfs-tools squashfuse fuse3 fuse-overlayfs fakeroot uidmap patchelf
  work=$(mktemp -d)
  mkdir -p "$work"/{state/lists/partial,cache/archives/partial,parts}
  : >"$work/status"
  # shellcheck disable=SC2016
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | head -n 1)
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' "$uri" >"$work/sources.list"
  apt=(-o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=$work/parts"
    -o "Dir::Cache=$work/cache" -o "Dir::State=$work/state" -o "Dir::State::status=$work/status"
    -o APT::Sandbox::User=root -o Acquire::Languages=none)
  apt-get -qq "${apt[@]}" update || skip "Debian's unstable release, which has Apptainer, is out of reach"
  mapfile -t packages < <(apt-cache "${apt[@]}" depends apptainer |
    sed -n 's/^ *Depends: \(lib[a-z0-9.+-]*\)$/\1/p' | sort -u)
  (cd "$work" && apt-get -qq "${apt[@]}" download apptainer "${packages[@]}")
  rm -rf "$apptainer"
  mkdir -p "$apptainer/bin"
  for elf in "$work"/*.deb; do dpkg-deb -x "$elf" "$apptainer"; done
  rm -rf "$work"
  loader=$(find "$apptainer/usr/lib" -name 'ld-linux*.so.*' -type f | head -n 1)
  libraries=${loader%/*}
  for elf in "$apptainer/usr/bin/apptainer" "$libraries/apptainer/bin/starter"; do
    # RPATH and not RUNPATH, which does not count for the libraries' own libraries
    patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$libraries" "$elf"
  done
  # both programs look for etc and var beside themselves, at different depths
  ln -sfn ../etc "$apptainer/usr/etc"
  ln -sfn ../var "$apptainer/usr/var"
  ln -sfn ../../etc "$apptainer/usr/lib/etc"
  ln -sfn ../../var "$apptainer/usr/lib/var"
  ln -sfn ../bin "$apptainer/usr/lib/bin"
  mkdir -p "$apptainer/var/lib/apptainer/mnt/session"
}

wrap_apptainer() {
  cat >"$apptainer/bin/apptainer" <<'WRAPPER'
#!/bin/sh
# root without every capability: Apptainer asks for all and fails; the one that is often missing is dropped
here=$(dirname "$(readlink -f "$0")")
if [ "$(id -u)" = 0 ] && ! capsh --has-p=cap_sys_resource 2>/dev/null; then
  export APPTAINER_DROP_CAPS=${APPTAINER_DROP_CAPS:-CAP_SYS_RESOURCE}
fi
exec "$here/../usr/bin/apptainer" "$@"
WRAPPER
  chmod 755 "$apptainer/bin/apptainer"
  [ ! -e /dev/fuse ] || chmod 666 /dev/fuse
}

# A Debian with Python, as an image and as an archive for Apptainer: no registry is asked.
make_base() {
  [ -s "$folder/base.oci.tar" ] && podman image exists localhost/lora-base && return
  # a memory file system is three times as fast
  [ -s "$folder/base.tar" ] || TMPDIR=$([ -w /dev/shm ] && echo /dev/shm || echo /tmp) mmdebstrap --quiet \
    --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base.tar" ||
    skip "mmdebstrap cannot make a base image"
  podman import --quiet "$folder/base.tar" localhost/lora-base >/dev/null
  rm -f "$folder/base.oci.tar"
  podman save --quiet --format oci-archive --output "$folder/base.oci.tar" localhost/lora-base
}

mkdir -p "$folder/bin"
chmod 755 "$folder"
install podman buildah runc fuse-overlayfs uidmap mmdebstrap libcap2-bin
install_apptainer
if [ -x "$apptainer/usr/bin/apptainer" ]; then
  wrap_apptainer
  ln -sfn "$apptainer/bin/apptainer" "$folder/bin/apptainer"
fi
# runc and the host's network work on machines without systemd too; limits that a confined root may set
cat >"$folder/containers.conf" <<'CONF'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "host"
[engine]
runtime = "runc"
CONF
export CONTAINERS_CONF=$folder/containers.conf
make_base
id lora-tester >/dev/null 2>&1 || useradd --create-home --shell /bin/bash lora-tester
printf 'ready: %s\n' "$folder"
