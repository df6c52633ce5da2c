"""`python -m lora_train.gpu_monitor`: records the GPUs of a run while it runs, beside the trainer.

The image's entrypoint starts it before the trainer. It keeps samples in memory until the trainer
publishes its run directory in $LORA_STATE_DIR, then appends them to gpu_memory_log.csv there. It
never disturbs the run: whatever goes wrong costs one line on stderr, and the exit status is 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from lora_train.gpu_samples import (
    COLUMNS,
    Gpu,
    end_with_parent,
    is_asked,
    select_gpus,
    sources,
)

_DEFAULT_SECONDS = 5.0
# 8 GPUs for 3 hours at 5 s: longer than any model takes to load
_MAX_ROWS = 20_000


class RowLog:
    """Rows on their way into the run directory's CSV file.

    Args:
        state: the folder in which the trainer publishes its run directory.
        name: name of the CSV file.
    """

    def __init__(self, state: str, name: str) -> None:
        self.rows: deque[str] = deque(maxlen=_MAX_ROWS)
        self._published = os.path.join(state, "run_directory")
        self._name = name
        self._path: str | None = None
        self._has_failed = False

    def write(self) -> None:
        """Append the rows at hand, if the run directory is known; keep them if that fails."""
        if self._path is None:
            try:
                with open(self._published, encoding="utf-8", errors="surrogateescape") as file:
                    self._path = os.path.join(file.readline().removesuffix("\n"), self._name)
            except OSError:
                return
        if not self.rows:
            return
        try:
            # tasks that see other GPUs of this node write into the same file: one header for all
            with _locked(f"log-{_short(self._path)}"):
                _append(self._path, self.rows)
            self.rows.clear()
        except OSError as error:
            if not self._has_failed:
                _say(f"cannot write {self._path}: {error.strerror}; the run goes on without it")
            self._has_failed = True


def main() -> int:
    """Watch the GPUs of this job until SIGTERM, the parent's end, or nothing is left to do.

    Returns:
        The exit status, always 0.
    """
    stop = _listen_for_stop()
    state = os.environ.get("LORA_STATE_DIR", "")
    if not os.path.isdir(state):
        _say(f"LORA_STATE_DIR={state!r} is not a folder; nothing is recorded")
        return 0
    seconds = _interval(os.environ)
    log = RowLog(state, _file_name(os.environ))
    watched: list[Gpu] = []
    problem: str | None = None
    for source in sources():
        gpus = source.gpus(stop)
        if is_asked(stop):
            break
        if gpus and not watched:
            watched = select_gpus(gpus, os.environ)
            if not _is_first(watched, state):
                return 0
            _say(_describe(watched, seconds))
        if gpus:
            if problem:
                _say(f"{problem}; going on with {source.name}")
            for rows in source.rows(watched, seconds, stop):
                log.rows.extend(rows)
                if len(log.rows) >= len(watched):  # a sample of 8 GPUs may come in 8 pieces
                    log.write()
        if is_asked(stop):
            break
        problem = source.problem if gpus else problem or source.problem
    else:
        _say(f"{problem or 'no NVIDIA GPU here'}; nothing {'more ' if watched else ''}is recorded")
        # the trainer may still be loading its model: what was seen until now is worth having
        while log.rows and not select.select([stop], [], [], seconds)[0]:
            log.write()
    log.write()
    return 0


def _listen_for_stop() -> int:
    """Turn SIGTERM into a file descriptor that becomes readable, and stay readable."""
    parent = os.getppid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    end_with_parent(parent)
    # they reach whole process groups and job steps; the trainer goes on to save its checkpoint
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    return reader


def _interval(environment: Mapping[str, str]) -> float:
    text = environment.get("LORA_MONITOR_SECONDS") or str(_DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0 < seconds < float("inf"):
        return seconds
    _say(f"LORA_MONITOR_SECONDS={text!r}: expected a positive number; taking {_DEFAULT_SECONDS:g}")
    return _DEFAULT_SECONDS


def _file_name(environment: Mapping[str, str]) -> str:
    several_nodes = environment.get("SLURM_JOB_NUM_NODES", "1") != "1"
    return f"gpu_memory_log{f'-{os.uname().nodename}' if several_nodes else ''}.csv"


def _describe(gpus: list[Gpu], seconds: float) -> str:
    parts = [
        f"GPU {gpu.number} {gpu.name} is split (MIG): "
        f"{', '.join(sorted({profile for profile, _ in gpu.slices}))}; "
        "utilization of a slice is not reported"
        if gpu.slices
        else f"GPU {gpu.number} {gpu.name}"
        for gpu in gpus
    ]
    return f"a sample every {seconds:g} s of {'; '.join(parts)}"


def _is_first(gpus: list[Gpu], state: str) -> bool:
    """Whether no other task of this job step watches the same GPUs; holds the place if so.

    Without Slurm each start is a job of its own, named by its state folder.
    """
    step = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    job = step if step[0] else [state]
    name = "watch-" + _short(" ".join([*job, *sorted(gpu.uuid for gpu in gpus)]))
    try:
        place = _open_lock(name)
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
    except BlockingIOError:
        return False
    except OSError:
        pass  # no place for locks: rows twice are better than none
    return True


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    place = None
    try:
        with contextlib.suppress(OSError):
            place = _open_lock(name)
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        if place is not None:
            os.close(place)


def _open_lock(name: str) -> int:
    """Open a lock file in this user's folder on the node's own disk, where locks work.

    Args:
        name: of the lock.

    Returns:
        A file descriptor, not inherited by children.

    Raises:
        OSError: there is no such folder, or it is another user's.
    """
    folder = os.path.join(tempfile.gettempdir(), f"lora-train-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return os.open(os.path.join(folder, f"{name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)


def _append(path: str, rows: Iterable[str]) -> None:
    """Append rows, below the header in a new file: all of them or, with an OSError, none."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(file).st_size
        lines = rows if size else [", ".join(COLUMNS), *rows]
        unwritten = "".join(f"{line}\n" for line in lines).encode()
        try:
            while unwritten:
                unwritten = unwritten[os.write(file, unwritten) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def _short(name: str) -> str:
    return f"{zlib.crc32(os.fsencode(name)):08x}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"gpu monitor: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
