"""The GPUs of this node, as the driver's own library (NVML) names them. Creates no CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml  # type: ignore[import-untyped]

T = TypeVar("T")

OLDEST = (8, 0)
"""Ampere, the first GPUs with bf16 matrix units; the kernels are compiled for nothing older."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one instance (MIG) of it."""

    index: int
    """Number on this node; an instance has its GPU's."""
    uuid: str
    """GPU-... or MIG-..."""
    name: str
    """What the driver calls it."""
    capability: tuple[int, int] | None
    """Compute capability; None: the driver does not say."""
    memory: int
    """Bytes; 0: not known."""
    used: int
    """Bytes in use; 0: not known."""
    is_instance: bool = False
    """Whether it is a MIG instance."""
    parent_uuid: str = ""
    """Of an instance: its GPU."""
    is_divided: bool = False
    """A GPU in MIG mode of which this job sees no instance: nothing can run on it."""

    def __str__(self) -> str:
        return f"{self.name} ({'part of ' if self.is_instance else ''}GPU {self.index})"


@dataclass(frozen=True)
class GpuReport:
    """All that is known of the node's GPUs without using one."""

    gpus: tuple[Gpu, ...] = ()
    """In NVML's order. An instance stands in the place of its GPU."""
    driver: str | None = None
    """Version of the driver, such as 550.54.15; None: NVML does not run."""
    problem: str | None = None
    """Why there is no list, or what is missing in it."""
    has_libcuda: bool = False
    """Whether this process can load libcuda.so.1, without which nothing runs on a GPU."""
    cuda: tuple[int, int] | None = None
    """Newest CUDA that the loaded libcuda.so.1 runs; None: not known."""


def read_gpus() -> GpuReport:
    """Ask the driver; takes some milliseconds, and may hang where a GPU is broken."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReport(problem=f"NVML: {error}")
    gpus: list[Gpu] = []
    problems = []
    try:
        driver = _value(pynvml.nvmlSystemGetDriverVersion, None)
        for index in range(_value(pynvml.nvmlDeviceGetCount, 0)):
            try:
                gpus += _read_gpu(index, pynvml.nvmlDeviceGetHandleByIndex(index))
            except pynvml.NVMLError as error:  # fallen off the bus, or not this job's
                problems.append(f"GPU {index}: {error}")
    finally:
        _value(pynvml.nvmlShutdown, None)
    return GpuReport(tuple(gpus), driver, "; ".join(problems) or None)


def visible_gpus(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Choose those that CUDA_VISIBLE_DEVICES leaves to this process, as CUDA reads it.

    Args:
        gpus: all of the node, in NVML's order.

    Returns:
        The visible ones in CUDA's order; as in CUDA the first word that names none ends the list.
        One that is divided without an instance for this process is left out beside others.
    """
    ordered = list(gpus)
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":  # NVML's; CUDA's is fastest first
        ordered.sort(key=lambda gpu: gpu.capability or (0, 0), reverse=True)
    numbers = list(dict.fromkeys(gpu.index for gpu in ordered))
    chosen = ordered
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is not None:
        chosen = []
        for word in map(str.strip, text.split(",")):
            gpu = next((gpu for gpu in ordered if _is_named(gpu, word, numbers)), None)
            if gpu is None:
                break
            chosen.append(gpu)
    return [gpu for gpu in chosen if not gpu.is_divided] or chosen


def _is_named(gpu: Gpu, word: str, numbers: Sequence[int]) -> bool:
    if word.isdecimal():
        return numbers[int(word) : int(word) + 1] == [gpu.index]
    if word.startswith("MIG-GPU-"):  # drivers before 470: MIG-GPU-<uuid>/<instance>/<part>
        return gpu.is_instance and word.startswith(f"MIG-{gpu.parent_uuid}/")
    # CUDA takes the beginning of a UUID too
    return len(word) > len("GPU-") and gpu.uuid.startswith(word)


def _read_gpu(index: int, handle: Any) -> list[Gpu]:
    uuid = _value(lambda: pynvml.nvmlDeviceGetUUID(handle), "")
    name = _value(lambda: pynvml.nvmlDeviceGetName(handle), "GPU of unknown name")
    capability = _value(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle), None)
    if _value(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0], 0):
        instances = []
        for number in range(_value(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)):
            part = _mig_handle(handle, number)
            if part is None:
                continue
            memory, used = _memory(part)
            instances.append(
                Gpu(
                    index=index,
                    uuid=_value(lambda part=part: pynvml.nvmlDeviceGetUUID(part), ""),  # type: ignore[misc]
                    name=_value(lambda part=part: pynvml.nvmlDeviceGetName(part), name),  # type: ignore[misc]
                    capability=capability,
                    memory=memory,
                    used=used,
                    is_instance=True,
                    parent_uuid=uuid,
                )
            )
        return instances or [Gpu(index, uuid, name, capability, 0, 0, is_divided=True)]
    return [Gpu(index, uuid, name, capability, *_memory(handle))]


def _mig_handle(handle: Any, number: int) -> Any:
    return _value(lambda: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number), None)


def _memory(handle: Any) -> tuple[int, int]:
    memory = _value(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle), None)
    return (0, 0) if memory is None else (int(memory.total), int(memory.used))


def _value(ask: Callable[[], T], otherwise: T) -> T:
    """Return what NVML answers, or `otherwise`: each driver leaves other questions open."""
    try:
        return ask()
    except pynvml.NVMLError:
        return otherwise


def loaded_cuda() -> tuple[int, int] | None:
    """Load the driver's library as torch will, and ask what it runs; starts nothing on a GPU.

    Returns:
        The newest CUDA that it runs; None: it does not say.

    Raises:
        OSError: libcuda.so.1 cannot be loaded.
    """
    version = ctypes.c_int(0)
    # needs no cuInit; a library for forward compatibility answers for itself, not for the driver
    ask = getattr(ctypes.CDLL("libcuda.so.1"), "cuDriverGetVersion", None)
    if ask is None or ask(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
