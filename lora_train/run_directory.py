"""The run directory: where it lies, whether it may be gone on with, and what it records of the run.

runs/NAME/  config.yaml  environment.json  train.log  metrics.jsonl  checkpoints/  adapter/
timeline.jsonl  summary.json  report.html  plots/
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_train.checkpoint import Checkpoint, newest_complete
from lora_train.config import Config
from lora_train.config_loading import flatten, read_yaml, to_tree, to_yaml
from lora_train.errors import UserError
from lora_train.paths import dangling_link
from lora_train.timeline import Timeline

log = logging.getLogger(__name__)

# a change of these would make the checkpoint another run's: other weights, other data, other order
_FIXED = (
    "model.path", "model.revision", "model.quantization", "model.double_quantization",
    "model.chat_template", "peft.",
    "data.path", "data.subset", "data.revision", "data.train_split", "data.format",
    "data.train_on", "data.add_bos", "data.seq_length", "data.packed_sequence", "data.overlong",
    "data.global_batch_size", "data.validation_size", "optim.name", "optim.loraplus_lr_ratio",
    "trainer.seed",
)  # fmt: skip
# these say nothing about the steps
_FREE = ("log.", "resume.", "trainer.devices", "trainer.num_nodes")


@dataclasses.dataclass
class RunDirectory:
    """An opened run directory: checked against the configuration and locked."""

    path: Path
    checkpoint: Checkpoint | None
    lock: FileLock | None
    """Held by the main process; None on the others."""
    timeline: Timeline = dataclasses.field(default_factory=Timeline)
    """What the run's time goes into; records once it has `started`, on the main process."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter."""
        return self.path / "adapter"

    def read_json(self, name: str) -> Any:
        """A JSON file of the run, or None when it is not there (yet)."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        self._write(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        unfinished = self.path / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path / name)

    def close(self) -> None:
        """Release the lock; a directory in which nothing was written goes again."""
        if self.lock is None:
            return
        self.lock.release()
        lock_file = Path(self.lock.lock_file)
        if not any(entry for entry in self.path.iterdir() if entry != lock_file):
            lock_file.unlink(missing_ok=True)
            self.path.rmdir()

    def record_start(self, config: Config, receipt: dict[str, Any]) -> None:
        """Write down what makes this run, and take back what an earlier part left unfinished.

        Args:
            config: the run's configuration.
            receipt: what `receipts.start.describe_start` returned; environment.json gets it.
        """
        # an end that is not the end any more; without a checkpoint, a start that was not this one's
        stale = ["summary.json", "answers_after.json"]
        if self.checkpoint is None:
            stale += ["answers_before.json", "metrics.jsonl"]
        for name in stale:
            (self.path / name).unlink(missing_ok=True)
        self._write("config.yaml", to_yaml(config))
        starts = None
        with contextlib.suppress(ValueError):  # damaged: no run waits for its own history
            starts = self.read_json("environment.json")
        earlier = starts if isinstance(starts, list) else []
        self.write_json("environment.json", [*earlier, receipt])


def open_run_directory(config: Config) -> RunDirectory:
    """Find the run directory, lock it, and decide whether and from where to go on.

    Args:
        config: the validated configuration.

    Returns:
        The directory with its newest complete checkpoint, if any; release its lock at the end.

    Raises:
        UserError: not writable, in use by another process, not a run directory, or made with
            settings that this configuration contradicts.
    """
    name = config.log.name or "run"
    path = Path(config.log.log_dir).expanduser() / name
    if config.resume.mode == "never":
        path = _of_this_job(path) or _first_unused(path)
    _check_writable(path)
    if path.exists() and not (path / "config.yaml").exists():
        entries = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
        if entries:
            raise UserError(
                f"{path} is not a run directory: it holds {', '.join(entries[:4])} "
                "and no config.yaml",
                hint="log.name=ANOTHER_NAME, or --resume never for a new directory",
            )
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{path} is in use by another lora-train (it holds {lock.lock_file})",
            hint="wait for it, or log.name=ANOTHER_NAME for a second run beside it",
        ) from error
    checkpoint = newest_complete(path / "checkpoints")
    if (path / "config.yaml").exists() and checkpoint is not None:
        _compare(config, path, checkpoint)
    return RunDirectory(path, checkpoint, lock)


def publish_run_directory(path: Path) -> None:
    """Tell the GPU monitor where this run writes, if the image's entrypoint has started one.

    Args:
        path: the run directory, from now on in use.
    """
    state = os.environ.get("LORA_STATE_DIR", "")
    if not os.path.isdir(state):
        return
    published = Path(state, "run_directory")
    unfinished = published.with_name(f".run_directory-{os.getpid()}")  # each process publishes
    try:
        unfinished.write_bytes(os.fsencode(path.absolute()) + b"\n")
        unfinished.replace(published)
    except OSError as error:
        log.warning("no GPU log: cannot write %s: %s", published, error.strerror)


def is_finished(config: Config, directory: RunDirectory, summary: dict[str, Any]) -> bool:
    """Tell whether a run directory with a summary is complete for this configuration too.

    Args:
        config: the configuration that asks.
        directory: the run directory; its config.yaml made the summary.
        summary: its summary.json.

    Returns:
        Whether no step is left to do.
    """
    asked = config.trainer
    if asked.max_steps is not None:
        return bool(summary["steps"] >= asked.max_steps)
    made = read_yaml(directory.path / "config.yaml")["trainer"]
    return made["max_steps"] is None and made["max_epochs"] >= asked.max_epochs


def _compare(config: Config, path: Path, checkpoint: Checkpoint) -> None:
    """Refuse settings that contradict the checkpoint; say which others changed."""
    before = dict(flatten(read_yaml(path / "config.yaml")))
    now = dict(flatten(to_tree(config)))
    changed = [
        f"{key}: {before[key]} -> {now[key]}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key] and now[key] != "auto" and not key.startswith(_FREE)
    ]
    contradicting = [line for line in changed if line.startswith(_FIXED)]
    if contradicting:
        raise UserError(
            f"{path} holds a run of {checkpoint.step} steps made with other settings:\n  "
            + "\n  ".join(contradicting),
            hint="--resume never starts over in a new directory; log.name=ANOTHER_NAME names it",
        )
    for line in changed:
        log.warning("changed since step %d: %s", checkpoint.step, line)


def _of_this_job(path: Path) -> Path | None:
    """Return the directory that this very Slurm job began before it was queued again, or None."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return None
    for candidate in sorted(path.parent.glob(f"{path.name}*")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            starts = json.loads((candidate / "environment.json").read_text(encoding="utf-8"))
            if starts[-1]["variables"]["SLURM_JOB_ID"] == os.environ["SLURM_JOB_ID"]:
                return candidate
    return None


def _first_unused(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _check_writable(path: Path) -> None:
    folder = path
    try:
        if (link := dangling_link(path)) is not None:
            raise UserError(
                f"cannot write the run directory {path}: {link} is a link to "
                f"{os.readlink(link)}, which does not exist",
                hint="inside a container only bound folders are seen: --bind it, or "
                "log.log_dir=FOLDER names another",
            )
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full and (path / "summary.json").is_file():
            return  # a finished run only shows it; one that goes on needs room, and says so
        raise UserError(
            f"cannot write the run directory {path}: {error.strerror} ({folder})",
            hint="log.log_dir=FOLDER names one on project or scratch storage",
        ) from error
