"""Let `pip` inside an image build fetch from where this machine's pip does, leaving no trace.

    pip_passthrough.py buildah FOLDER      prints --volume options for `buildah build`
    pip_passthrough.py apptainer FOLDER    prints NAME=VALUE lines for the build's environment

pip's settings (`pip config list`: files and PIP_* variables) are written to FOLDER/pip.conf.
buildah mounts it, the certificates and the local folders that it names at their own paths.
Apptainer shows its %post the host's /tmp and /var/tmp: FOLDER must be below one of them, and they
are copied there.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# what concerns this machine's own installations
_IGNORED = {"target", "prefix", "user", "root", "cache-dir", "require-virtualenv", "log"}
# a later section wins over an earlier one
_SECTIONS = ("global", "site", "user", "install", ":env:")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def settings() -> dict[str, str]:
    """pip's effective settings by name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for line in listed.splitlines():
        match = re.match(r"(:env:|[\w-]+)\.([\w-]+)=(.*)", line)
        if match and match[1] in _SECTIONS and match[2] not in _IGNORED:
            found.append((_SECTIONS.index(match[1]), match[2], ast.literal_eval(match[3])))
    return {name: value for _, name, value in sorted(found)}


class Mounts:
    """What of this machine is seen inside, and where."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.pairs: list[tuple[str, str]] = []

    def place(self, source: str, destination: str) -> str:
        """Show a file or folder inside the build; return its path there."""
        if self.kind == "buildah":
            if (source, destination) not in self.pairs:
                self.pairs.append((source, destination))
            return destination
        inside = self.folder / source.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():
            shutil.copytree(source, inside, dirs_exist_ok=True, copy_function=_link_or_copy)
        else:
            shutil.copy(source, inside)
        return str(inside)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(os.path.realpath(source), destination)
    except FileExistsError:
        pass
    except OSError:
        shutil.copy(source, destination)


def _with_folders(words: str, mounts: Mounts) -> str:
    placed = []
    for word in words.split():
        path = word.removeprefix("file://")
        if path.startswith("/") and os.path.isdir(path):
            path = path.rstrip("/")
            # the pages of a `simple` index may link to files beside it
            top = os.path.dirname(path) if os.path.basename(path) == "simple" else path
            word = word.replace(path, mounts.place(top, top) + path[len(top) :])
        placed.append(word)
    return " ".join(placed)


def main(kind: str, folder: Path) -> None:
    """Write pip.conf and print what makes a build use it."""
    folder.mkdir(parents=True, exist_ok=True)
    mounts, values = Mounts(kind, folder.absolute()), settings()
    certificates = values.get("cert") or os.environ.get("SSL_CERT_FILE") or _CERTIFICATES
    if os.path.exists(certificates):
        values["cert"] = mounts.place(os.path.realpath(certificates), _CERTIFICATES)
    for name in ("find-links", "index-url", "extra-index-url"):
        if name in values:
            values[name] = _with_folders(values[name], mounts)
    # a limit of this machine's; the lock file holds the versions
    values.pop("constraint", None)
    configuration = folder.absolute() / "pip.conf"
    lines = [f"{name} = " + "\n    ".join(value.split()) for name, value in values.items()]
    configuration.write_text("\n".join(["[global]", *lines, ""]))
    if kind == "buildah":
        for source, destination in [*mounts.pairs, (str(configuration), "/etc/pip.conf")]:
            print(f"--volume={source}:{destination}:ro")
    else:
        print(f"APPTAINERENV_PIP_CONFIG_FILE={configuration}")
        if "cert" in values:
            print(f"APPTAINERENV_SSL_CERT_FILE={values['cert']}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
