"""The real entrypoint in a small image: real folders, a stub in place of the trainer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# writes what it was started with, then does what STUB says; as `python -m ...` it is the monitor
STUB = """#!/usr/bin/env bash
out=$STUB_OUT
if [ "${1:-}" = -m ]; then
  echo "monitor start" >>"$out/order"
  trap 'echo "monitor end" >>"$out/order"; exit 0' TERM
  echo $$ >"$out/monitor.pid"
  while :; do sleep 0.05; done
fi
echo "trainer start" >>"$out/order"
: >"$out/argv"
[ $# -eq 0 ] || printf '%s\\0' "$@" >"$out/argv"
env -0 >"$out/environment"
case ${STUB:-} in
  wait)
    for name in TERM INT USR1; do
      trap "echo $name >>'$out/signals'; [ $name = USR1 ] || code=75" "$name"
    done
    code=""
    echo $$ >"$out/trainer.pid"
    while [ -z "$code" ]; do sleep 0.05; done
    ;;
  *) code=${STUB:-0} ;;
esac
echo "trainer end" >>"$out/order"
exit "$code"
"""


class Image:
    """A small image, and what its stubs wrote.

    Args:
        root: where it lies.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "opt with space"
        self.out = root / "out"
        self.work = root / "work dir"
        self.home = root / "home"
        self.tmp = root / "tmp"
        for folder in (self.out, self.work, self.home, self.tmp):
            folder.mkdir(parents=True)
        shutil.copytree(REPOSITORY / "entrypoint", self.root / "entrypoint")
        for name in ("venv/bin/lora-train", "venv/bin/python", "venv/bin/hf"):
            stub = self.root / name
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(STUB)
            stub.chmod(0o755)
        (self.root / "bin").mkdir()
        for name in ("lora-train", "nemo", "hf"):
            (self.root / "bin" / name).symlink_to("../entrypoint/entrypoint.sh")
        (self.root / "image.json").write_text(
            json.dumps({"version": "1.2.3", "commit": "abc", "cuda": "12.6"}, indent=1)
        )

    def environment(self, **variables: str) -> dict[str, str]:
        """A user's environment: nothing of the caller's but what programs need."""
        return {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "HOME": str(self.home),
            "USER": "ada",
            "TMPDIR": str(self.tmp),
            "STUB_OUT": str(self.out),
            **variables,
        }

    def start(self, *words: str, door: str = "entrypoint/entrypoint.sh", **variables: str) -> Any:
        """Start it in the work folder; returns the process."""
        return subprocess.Popen(
            [self.root / door, *words],
            cwd=self.work,
            env={k: v for k, v in self.environment(**variables).items() if v != "unset"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell that starts the tests in the background has them ignore SIGINT, which bash
            # cannot take back once it has begun so
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words: str, **options: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*words, **options)
        out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    @property
    def argv(self) -> list[str]:
        """The words that the trainer got."""
        return (self.out / "argv").read_text().split("\0")[:-1]

    @property
    def seen(self) -> dict[str, str]:
        """The environment that the trainer got."""
        lines = (self.out / "environment").read_text().split("\0")[:-1]
        return dict(line.split("=", 1) for line in lines)

    @property
    def order(self) -> list[str]:
        """What began and ended, in order."""
        return (self.out / "order").read_text().splitlines()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something has happened; a minute is a hang."""
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit, "it did not happen"
            time.sleep(0.02)

    def pid(self, who: str) -> int:
        """The process number of a stub, once it has begun."""
        file = self.out / f"{who}.pid"
        self.wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
        return int(file.read_text())


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
