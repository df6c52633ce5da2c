"""How many of the fused kernels came compiled from Triton's cache, and how many were compiled."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass
class KernelCount:
    """A listener of Triton's compiler: called once for each kernel, at its first launch."""

    cached: int = 0
    """Kernels that the cache held."""
    compiled: int = 0
    """Kernels that it did not."""
    seconds: float = 0.0
    """Time that the latter took."""

    def __call__(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        """Count one kernel."""
        if cache_hit:
            self.cached += 1
        else:
            self.compiled += 1
            self.seconds += times.total / 1e6

    def __str__(self) -> str:
        took = f" in {self.seconds:.1f} s" if self.compiled else ""
        return f"{self.cached} from the cache, {self.compiled} compiled{took}"


# of this process, until it is logged
_count: KernelCount | None = None


def start_counting() -> None:
    """Count kernels from here on, until `log_count`."""
    global _count
    from triton import knobs

    _count = knobs.compilation.listener = KernelCount()


def log_count() -> None:
    """Log what was counted and count no more; nothing where nothing is being counted."""
    global _count
    if _count is None:
        return
    from triton import knobs

    if _count.cached or _count.compiled:
        logger.info("kernels: %s", _count)
    _count = knobs.compilation.listener = None
