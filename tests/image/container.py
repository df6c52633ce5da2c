"""How the tests run containers."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# what install_tools.sh leaves
FOLDER = Path("/var/tmp/lora-image-tests")
BUILT_SIF = FOLDER / "lora.sif"
"""What `make test-image` builds."""
USER = "lora-tester"
SECONDS = 1200


def engine_environment() -> dict[str, str]:
    """This process's environment, with what install_tools.sh left."""
    return {
        **os.environ,
        "PATH": f"{FOLDER}/bin:{os.environ['PATH']}",
        "CONTAINERS_CONF": str(FOLDER / "containers.conf"),
    }


def podman(
    *words: str, image: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run words in an image."""
    return subprocess.run(
        ["podman", "run", "--rm", *options, image, *words], env=engine_environment(),
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


class Sif:
    """A SIF that a user who is not root runs.

    Args:
        path: the file.
        folder: where the user may write: work folders are made in it.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._folder = folder

    def work_folder(self, name: str) -> Path:
        """A folder that belongs to the user."""
        folder = self._folder / name
        folder.mkdir()
        shutil.chown(folder, USER, USER)
        return folder

    def start(
        self,
        *words: str,
        work: Path,
        verb: tuple[str, ...] = ("run", "--nv"),
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start `apptainer VERB lora.sif WORDS` as the user, in a folder; returns the process."""
        user = pwd.getpwnam(USER)
        return subprocess.Popen(
            ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
             str(FOLDER / "bin/apptainer"), *verb, str(self.path), *words],
            cwd=work,
            env={"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "USER": USER, **(environment or {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def run(
        self,
        *words: str,
        work: Path,
        verb: tuple[str, ...] = ("run", "--nv"),
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*words, work=work, verb=verb, environment=environment)
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(words, process.returncode, out, errors)
