"""Launch parameters of the kernels: read from tables, never tuned at run time.

A table stands in `launch_tables/sm_<capability>/<operation>.json`:

    {"kernel name": [{"max_width": 4096, "config": {"BLOCK_M": 16, ..., "num_warps": 4}}, ...]}

The first entry whose `max_width` (null: any) reaches the width of the data is taken. The tables are
written by `kernels/benchmarks/tune.py` on the GPU that they are named after; sm_80's, which no GPU
was at hand for, hold what compiles there without spills and within its shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "launch_tables"
# Ampere: what fits there fits every later GPU
_SAFE = "sm_80"


def launch_config(kernel: str, device: torch.device, width: int) -> dict[str, Any]:
    """Return the launch parameters of one kernel.

    Args:
        kernel: name of the kernel in the tables.
        device: where its tensors are; a CPU (the Triton interpreter) takes the safe table.
        width: columns that the kernel walks over, the key of the table's entries.

    Returns:
        Block sizes, `num_warps` and `num_stages`, to be passed to the launch as keywords.
    """
    for entry in _table(_table_name(device))[kernel]:
        if entry["max_width"] is None or width <= entry["max_width"]:
            return dict(entry["config"])
    raise LookupError(f"no entry for {kernel} of width {width}")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _table_name(device: torch.device) -> str:
    if device.type != "cuda":
        return _SAFE
    return _table_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _table_of_gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    name = f"sm_{major}{minor}"
    if (TABLES / name).is_dir():
        return name
    logger.warning(
        "no launch table for %s (%s): the kernels run with the parameters of %s",
        torch.cuda.get_device_name(index), name, _SAFE,
    )  # fmt: skip
    return _SAFE


@functools.cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    merged: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((TABLES / name).glob("*.json")):
        merged |= json.loads(path.read_text())
    return merged
