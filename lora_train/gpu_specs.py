"""What NVIDIA's data sheets say of the GPUs that this trains on. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """A GPU, as its data sheet has it."""

    name: str
    memory_gib: float
    """What the driver reports in all, in GiB: less than the name says."""
    bf16_tflops: float
    """Dense bf16 products with fp32 sums, in 10^12 operations a second."""
    bandwidth_tbs: float
    """Of its memory, in 10^12 bytes a second."""


# words of the driver's name -> the data sheet; the first whose words are all in it. NVIDIA's data
# sheets of A100, A30, A10, A40, L4, L40, L40S, RTX A6000, GeForce RTX 4090, H100, H200, GH200 and
# B200; tensor cores without sparsity.
_SPECS: tuple[tuple[tuple[str, ...], GpuSpec], ...] = (
    (("a100", "40gb"), GpuSpec("A100-40", 39.4, 312.0, 1.555)),
    (("a100",), GpuSpec("A100-80", 79.2, 312.0, 2.039)),
    (("h100", "pcie"), GpuSpec("H100-PCIe", 79.2, 756.0, 2.0)),
    (("h100", "nvl"), GpuSpec("H100-NVL", 93.1, 835.0, 3.9)),
    (("h100",), GpuSpec("H100-80", 79.2, 989.0, 3.35)),
    (("gh200",), GpuSpec("GH200", 95.0, 989.0, 4.0)),
    (("h200",), GpuSpec("H200", 139.8, 989.0, 4.8)),
    (("b200",), GpuSpec("B200", 178.0, 2250.0, 8.0)),
    (("a30",), GpuSpec("A30", 23.5, 165.0, 0.933)),
    (("a10",), GpuSpec("A10", 22.0, 125.0, 0.6)),
    (("a40",), GpuSpec("A40", 44.4, 150.0, 0.696)),
    (("a6000",), GpuSpec("RTX-A6000", 47.4, 155.0, 0.768)),
    (("l40s",), GpuSpec("L40S", 44.4, 362.0, 0.864)),
    (("l40",), GpuSpec("L40", 44.4, 181.0, 0.864)),
    (("l4",), GpuSpec("L4", 22.0, 121.0, 0.3)),
    (("4090",), GpuSpec("RTX-4090", 23.5, 165.0, 1.008)),
)


def gpu_spec(name: str) -> GpuSpec | None:
    """Look up a GPU.

    Args:
        name: as the driver has it, such as "NVIDIA A100-SXM4-80GB", or ours, such as "A100-80".

    Returns:
        Its data sheet; None for one that is not listed, and for a part of one (MIG).
    """
    for _, spec in _SPECS:
        if spec.name == name:
            return spec
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if "mig" in words:
        return None
    return next((spec for parts, spec in _SPECS if words.issuperset(parts)), None)
