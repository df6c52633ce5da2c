"""`python -m lora_train.gpu_nvml`: the two calls of nvidia-smi that the monitor makes, by NVML.

For containers that get the driver's libraries and not its programs. A process of its own, because a
call into a broken driver may never return.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pynvml  # type: ignore[import-untyped]

from lora_train.gpu_samples import timestamp


def main(words: list[str]) -> int:
    """List the GPUs, or print samples until the process is ended.

    Args:
        words: `-L`, or `-i NUMBERS -lms MILLISECONDS`.

    Returns:
        The exit status: 1 where NVML does not work.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return 0  # no driver, no GPUs: nothing worth a word
    except pynvml.NVMLError as error:
        print(error)
        return 1
    if words == ["-L"]:
        for index in range(pynvml.nvmlDeviceGetCount()):
            _print_gpu(index)
        return 0
    _, numbers, _, milliseconds = words
    handles = [
        (number, pynvml.nvmlDeviceGetHandleByIndex(int(number))) for number in numbers.split(",")
    ]
    due = time.monotonic()
    while True:
        for number, handle in handles:
            print(", ".join([timestamp(), number, *_values(handle)]))
        sys.stdout.flush()
        due = max(due + int(milliseconds) / 1000, time.monotonic())
        time.sleep(due - time.monotonic())


def _print_gpu(index: int) -> None:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    print(f"GPU {index}: {name} (UUID: {pynvml.nvmlDeviceGetUUID(handle)})")
    try:
        is_split = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # not a kind of GPU that can be split, or an older driver
        return
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_split else 0):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError:  # no slice in this place, or not one of ours
            continue
        profile = pynvml.nvmlDeviceGetName(part).removeprefix(name).strip()
        print(f"  {profile}     Device  {place}: (UUID: {pynvml.nvmlDeviceGetUUID(part)})")


def _values(handle: Any) -> list[str]:
    """Values in the order of `gpu_samples.COLUMNS`, after timestamp and index."""
    memory = _read(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2))
    # an older driver; its `used` holds what the driver keeps for itself too
    memory = memory or _read(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    utilization = _read(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    power = _read(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    temperature = _read(
        lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    )
    clock = _read(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    # the name that all drivers know
    reasons = _read(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return [
        "[N/A]" if value is None else text.format(value)
        for text, value in (
            ("{}", utilization and utilization.gpu),
            ("{}", memory and memory.used // 2**20),
            ("{}", memory and memory.total // 2**20),
            ("{:.2f}", power and power / 1000),
            ("{}", temperature),
            ("{}", clock),
            ("0x{:016X}", reasons),
            ("{}", _read(lambda: pynvml.nvmlDeviceGetUUID(handle))),
        )
    ]


def _read(call: Callable[[], Any]) -> Any:
    """What a call returns; None where this GPU or driver has no such value."""
    try:
        return call()
    except pynvml.NVMLError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
