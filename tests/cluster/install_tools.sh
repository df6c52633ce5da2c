#!/usr/bin/env bash
# What the tests under Slurm need on a Debian machine, as root: Slurm, MUNGE, a user.
#
#   install_tools.sh    installs what is missing; prints "skipped: REASON" where that cannot be done here
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
readonly packages=(slurmctld slurmd slurm-client munge)

skip() {
  printf 'skipped: %s\n' "$*" >&2
  exit 0
}

[ "$(id -u)" = 0 ] || skip "Slurm is installed and run by root"
command -v apt-get >/dev/null || skip "it is installed from Debian's packages"
if ! dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
  awk '$0 != "installed" { exit 1 } END { exit NR != 4 }'; then
  apt-get -qq update || skip "apt-get update fails"
  apt-get -qq install --yes --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
    skip "apt-get cannot install ${packages[*]}"
fi
id lora-tester >/dev/null 2>&1 || useradd --create-home --shell /bin/bash lora-tester
slurmctld -V
