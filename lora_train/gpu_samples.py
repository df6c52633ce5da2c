"""Where GPU samples come from: `nvidia-smi`, else NVML, each as a child process that prints rows.

Both print the same lines, so one reader serves them. It waits for the child and for the request to
stop together, and a driver that hangs holds up the child only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLUMNS = (
    "timestamp", "index", "utilization.gpu [%]", "memory.used [MiB]", "memory.total [MiB]",
    "power.draw [W]", "temperature.gpu", "clocks.current.sm [MHz]", "clocks_event_reasons.active",
    # device cgroups number each task's GPUs from 0: only this tells them apart
    "uuid",
)  # fmt: skip
START_SECONDS = 60.0
"""Longest wait for a source's first line."""

_FIELDS = ",".join(column.partition(" ")[0] for column in COLUMNS)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Gpu(NamedTuple):
    """A GPU as `nvidia-smi -L` names it, with the (profile, UUID) of its MIG slices."""

    number: str
    name: str
    uuid: str
    slices: tuple[tuple[str, str], ...] = ()


def end_with_parent(parent: int) -> None:
    """Let the kernel send this process SIGTERM when its parent ends, even by SIGKILL.

    Args:
        parent: the parent's process id, as it was before this call.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel knew of our wish
        os._exit(0)


class Source:
    """A program that lists GPUs with `-L` and prints samples with `-i NUMBERS -lms MILLISECONDS`.

    Args:
        name: what messages call it.
        program: the first words of its command line.
        queries: words that ask for `COLUMNS`, in the ways to try one after the other.
    """

    def __init__(self, name: str, program: list[str], queries: list[list[str]]) -> None:
        self.name = name
        self.problem: str | None = None
        """Why it printed nothing (more); None where there is no such program, or no GPU."""
        self._program = program
        self._queries = queries

    def gpus(self, stop: int) -> list[Gpu]:
        """List the GPUs it sees; none where it does not work.

        Args:
            stop: file descriptor that becomes readable when the monitor is to end.

        Returns:
            The GPUs, in its order.
        """
        chunks = self._chunks([*self._program, "-L"], stop)
        found = parse_list([line for lines in chunks for line in lines])
        if found:
            self.problem = None
        return found

    def rows(self, gpus: list[Gpu], seconds: float, stop: int) -> Iterator[list[str]]:
        """Yield rows in the order of `COLUMNS` until it ends, hangs at its start, or `stop`.

        Args:
            gpus: those to sample.
            seconds: from one sample to the next.
            stop: see `gpus`.

        Yields:
            The rows that came at once: one for each GPU, commonly.
        """
        numbers = ",".join(gpu.number for gpu in gpus)
        loop = ["-i", numbers, "-lms", str(max(1, round(seconds * 1000)))]
        for query in self._queries:
            has_rows = False
            for lines in self._chunks([*self._program, *query, *loop], stop):
                rows = [line for line in lines if line.count(", ") == len(COLUMNS) - 1]
                if rows:
                    has_rows = True
                    yield [row.replace("[Not Supported]", "[N/A]") for row in rows]  # old drivers
            if has_rows or is_asked(stop):
                return

    def _chunks(self, command: list[str], stop: int) -> Iterator[list[str]]:
        """Run a command and yield its lines, as many as come at once."""
        self.problem = None
        with contextlib.suppress(OSError), _running(command) as process:  # OSError: no such program
            assert process.stdout is not None
            output, rest, latest = process.stdout.fileno(), b"", ""
            # one that has begun may pause as long as it likes: waiting costs nothing
            while True:
                timeout = None if latest else START_SECONDS
                ready, _, _ = select.select([output, stop], [], [], timeout)
                if stop in ready:
                    return
                if not ready:
                    self.problem = f"{self.name} prints nothing within {START_SECONDS:g} s"
                    return
                chunk = os.read(output, 65536)
                if not chunk:
                    break
                *complete, rest = (rest + chunk).split(b"\n")
                lines = [line.decode("ascii", "replace").rstrip() for line in complete]
                latest = next((line for line in reversed(lines) if line), latest)
                yield lines
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            if latest or process.returncode:
                said = "" if latest[:1].isdigit() else f": {latest}"
                self.problem = f"{self.name} ended with status {process.returncode}{said}"


def sources() -> tuple[Source, ...]:
    """Return the sources in the order to try."""
    # the last field was clocks_throttle_reasons.active before driver 535
    queries = [
        [f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        for fields in (_FIELDS, _FIELDS.replace("clocks_event", "clocks_throttle"))
    ]
    return (
        Source("nvidia-smi", ["nvidia-smi"], queries),
        Source("NVML", [sys.executable, "-m", "lora_train.gpu_nvml"], [[]]),
    )


def is_asked(stop: int) -> bool:
    """Tell whether the monitor is to end."""
    return bool(select.select([stop], [], [], 0)[0])


def parse_list(lines: list[str]) -> list[Gpu]:
    """Read what `nvidia-smi -L` prints.

    Args:
        lines: such as `GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-...)` and below it, for each MIG
            slice, `  MIG 1g.10gb     Device  0: (UUID: MIG-...)`.

    Returns:
        The GPUs with their slices; other lines are left out.
    """
    found: list[Gpu] = []
    for line in lines:
        before, has_uuid, after = line.partition("(UUID: ")
        uuid = after.rstrip(") ")
        if not has_uuid:
            continue
        if before.startswith("GPU "):
            number, _, name = before.removeprefix("GPU ").partition(":")
            found.append(Gpu(number, name.strip(), uuid))
        elif before.lstrip().startswith("MIG ") and found:
            profile = before.partition("Device")[0].strip()
            found[-1] = found[-1]._replace(slices=(*found[-1].slices, (profile, uuid)))
    return found


def select_gpus(gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Pick the GPUs of this job out of those that the source sees.

    Without device cgroups every GPU of the node is seen, and SLURM_JOB_GPUS counts as nvidia-smi
    does. With them only the job's (or the task's) k GPUs are seen, renumbered 0 to k-1, while
    SLURM_JOB_GPUS keeps the node's numbers: those can all be among 0 to k-1 only if they are the
    same set. Else CUDA_VISIBLE_DEVICES decides, which Slurm renumbers along.

    Args:
        gpus: all that are seen.
        environment: the process's variables.

    Returns:
        Those to watch; all of them where nothing names any.
    """
    # Tasks on further nodes inherit the first node's SLURM_JOB_GPUS; and with MIG its numbers count
    # slices, not GPUs.
    is_first_node = environment.get("SLURM_NODEID", "0") == "0"
    if is_first_node and not any(gpu.slices for gpu in gpus):
        job = environment.get("SLURM_JOB_GPUS", "").split(",")
        if set(job) <= {gpu.number for gpu in gpus}:
            return [gpu for gpu in gpus if gpu.number in job]
    words = environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    named = [[gpu for gpu in gpus if _is_named(gpu, word)] for word in words]
    if all(named):
        return [gpu for gpu in gpus if any(gpu in some for some in named)]
    return gpus


def _is_named(gpu: Gpu, word: str) -> bool:
    """Whether a word of CUDA_VISIBLE_DEVICES (index, or the begin of a UUID) means this GPU."""
    if not word.startswith(("GPU-", "MIG-")):
        return word == gpu.number
    uuids = [gpu.uuid, *(uuid for _, uuid in gpu.slices)]
    # MIG-GPU-UUID/3/0 is how drivers before 470 name a slice
    return any(uuid.startswith(word) for uuid in uuids) or f"{gpu.uuid}/" in word


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child that ends with the block and with this process, whatever ends that."""
    monitor = os.getpid()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: end_with_parent(monitor),
        process_group=0,  # Ctrl-C is the trainer's
    )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.kill()  # and no wait: a process that waits for a broken driver cannot be ended
        assert process.stdout is not None
        process.stdout.close()


def timestamp() -> str:
    """Return the time as nvidia-smi writes it, such as 2026/11/26 12:13:20.123."""
    now = time.time()
    return time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d}"
