"""What the checks look at: this node, this job and this container."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_train import gpu_sign
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.preflight.deadline import start
from lora_train.preflight.nvml import OLDEST, Gpu, GpuReport, loaded_cuda, read_gpus, visible_gpus
from lora_train.ranks import Ranks, find_ranks, planned_ranks

_NVML_SECONDS = 3.0

_DRIVER_VERSION = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)")


@dataclass(frozen=True)
class Machine:
    """The node that this process is on. The environment variables are the process's own."""

    ask_gpus: Callable[[], GpuReport] = GpuReport
    """Returns the node's GPUs, and may wait for the driver."""
    root: Path = Path("/")
    """Where /proc, /dev and a container's marks are looked for; a test has its own."""
    run_follows: bool = True
    """Whether a run starts here and now; `lora-train preflight` may be given on a login node."""
    words: tuple[str, ...] = ()
    """The words of the command line, to be repeated in a line that mends."""

    def file(self, absolute: str) -> Path:
        """Return the path of a system file such as /dev/nvidia0."""
        return self.root / absolute.lstrip("/")

    @property
    def gpus(self) -> GpuReport:
        """The node's GPUs; waits for the driver's answer."""
        return self.ask_gpus()

    @property
    def in_job(self) -> bool:
        """Whether Slurm started this."""
        return bool(os.environ.get("SLURM_JOB_ID"))

    @property
    def is_login_node(self) -> bool:
        """Whether the run may start on another node than this one."""
        return not self.run_follows and not self.in_job

    @property
    def container(self) -> str | None:
        """Return apptainer (also for Singularity) or docker (also for Podman), or None."""
        names = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
        if any(map(os.environ.get, names)) or self.file("/.singularity.d").exists():
            return "apptainer"
        marks = ("/.dockerenv", "/run/.containerenv")
        return "docker" if any(self.file(mark).exists() for mark in marks) else None

    @property
    def in_image(self) -> bool:
        """Whether this is the project's own image, which sets cache variables and is read-only."""
        return self.file("/opt/lora/image.json").exists()

    @property
    def wants_cpu(self) -> bool:
        """Whether the user hides the GPUs."""
        return gpu_sign.wants_cpu()

    @property
    def gpu_sign(self) -> str | None:
        """What says that this process should have a GPU, or None."""
        return gpu_sign.gpu_sign(self.file("/dev/nvidia0"))

    def usable_gpus(self) -> list[Gpu]:
        """Return the GPUs that this process may use; none where the user wants the CPU."""
        return [] if self.wants_cpu else visible_gpus(self.gpus.gpus)

    def gpus_of_run(self, config: Config) -> list[Gpu]:
        """Return those that the processes of the run will take, one each."""
        return self.usable_gpus()[: self.processes_per_node(config)]

    def driver(self) -> str | None:
        """Return the version of the NVIDIA driver of this node, or None."""
        if self.gpus.driver is not None:
            return self.gpus.driver
        try:
            found = _DRIVER_VERSION.search(self.file("/proc/driver/nvidia/version").read_text())
        except OSError:
            return None
        return found[1] if found else None

    def count_devices(self) -> int:
        """Count the GPUs that processes of a run can take here, one each."""
        usable = self.usable_gpus()
        if usable:
            if any(gpu.is_instance for gpu in usable):
                return 1  # NCCL takes no two parts of one GPU
            young = [gpu for gpu in usable if (gpu.capability or OLDEST) >= OLDEST]
            return self._granted(len(young or usable))
        words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        named = [word for word in words if word.strip() not in ("", "-1", "NoDevFiles")]
        is_told = "CUDA_VISIBLE_DEVICES" in os.environ or self.gpus.driver is not None
        if not is_told and not self.wants_cpu:  # NVML is missing, or slow
            return self._granted(len(list(self.file("/dev").glob("nvidia[0-9]*"))))
        return 1 if any(word.startswith("MIG-") for word in named) else len(named)

    def _granted(self, num_seen: int) -> int:
        """How many of the GPUs that are seen are this job's."""
        granted = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if not self.in_job or os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            return num_seen
        # a cluster that does not hide the others' from a job; without GPUs in its configuration,
        # they belong to whom the whole node belongs to
        if not granted and os.environ.get("SLURM_CPUS_ON_NODE") == str(os.cpu_count()):
            return num_seen
        return min(num_seen, int(granted) if granted.isdecimal() else 1)

    def ranks(self, config: Config) -> Ranks:
        """Find out which processes the run has; on a login node those that are asked for.

        Args:
            config: the run.

        Returns:
            The ranks of this process, or of the first one there will be.

        Raises:
            UserError: the shape of the job cannot work.
        """
        if self.is_login_node:
            return planned_ranks(config)
        return find_ranks(config, self.count_devices)

    def processes_per_node(self, config: Config) -> int:
        """Count the processes of the run on this node; at least 1."""
        try:
            return self.ranks(config).local_world_size
        except UserError:
            return 1  # the check of the processes says what is wrong

    @property
    def gpu_options(self) -> str:
        """What lets the GPU into this kind of container."""
        return "--gpus all" if self.container == "docker" else "--nv"

    def run_container(self, options: str) -> str:
        """Return the line that starts this run in its container.

        Args:
            options: what it must be started with, such as --nv.

        Returns:
            A line for the shell; of a Docker image the name is not known.
        """
        words = shlex.join(self.words)
        if self.container == "docker":
            return f"docker run {options} IMAGE {words}".strip()
        return f"singularity run {options} {_image_file()} {words}".strip()

    def shell_line(
        self, program: str, words: Sequence[str], variables: Mapping[str, str], options: str
    ) -> str:
        """Return the line that starts a program of this installation, such as hf.

        Args:
            program: its name.
            words: its arguments.
            variables: what is set for it.
            options: what a container must be started with.

        Returns:
            A line for the shell of the node; in another Docker container than the image's, for the
            shell of that container.
        """
        parts = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        if self.container == "docker" and self.in_image:
            parts = ["docker run", *(f"-e {each}" for each in parts), options, "IMAGE"]
        elif self.container == "apptainer":
            parts += ["singularity exec", options, _image_file()]
        return " ".join([*filter(None, parts), shlex.join([self.program(program), *words])])

    def program(self, name: str) -> str:
        """Return how a program of this installation is called: by path, in the image by name."""
        return name if self.in_image else str(Path(sys.executable).with_name(name))


def this_machine(words: tuple[str, ...], *, run_follows: bool) -> Machine:
    """Look at the node that this process is on.

    Args:
        words: the words of the command line.
        run_follows: whether a run starts here and now.

    Returns:
        The machine. Its driver is being asked, which only what looks at the GPUs waits for.
    """
    return Machine(_ask_driver(), run_follows=run_follows, words=words)


def _ask_driver() -> Callable[[], GpuReport]:
    end = time.monotonic() + _NVML_SECONDS
    asked, loaded = start(read_gpus), start(loaded_cuda)

    def answer() -> GpuReport:
        try:
            report = asked.result(timeout=max(0.0, end - time.monotonic()))
        except TimeoutError:
            silent = f"the driver did not answer within {_NVML_SECONDS:.0f} s"
            report = GpuReport(problem=silent)
        except Exception as error:  # a library that nobody has tried; a run does not need it
            report = GpuReport(problem=f"NVML: {error}")
        try:
            cuda = loaded.result(timeout=max(0.0, end - time.monotonic()))
        except (OSError, TimeoutError):
            return report
        return dataclasses.replace(report, has_libcuda=True, cuda=cuda)

    return answer


def _image_file() -> str:
    names = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
    return shlex.quote(next(filter(None, map(os.environ.get, names)), "IMAGE.sif"))
