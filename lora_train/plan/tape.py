"""A tape of allocations: what is live, and what was live when most was. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# what a step needs memory for
WEIGHTS = "frozen weights"
COPIES = "kernels' working copies"
ADAPTER = "adapter (fp32)"
OPTIMIZER = "optimizer states"
GRADIENTS = "gradients"
KEPT = "activations kept"
WORKING = "activations in use"
LOGITS = "logits"
OTHER = "cuBLAS workspace, batch"
PARTS = (WEIGHTS, COPIES, ADAPTER, OPTIMIZER, GRADIENTS, KEPT, WORKING, LOGITS, OTHER)

# sizes that torch's allocator rounds up to
_BLOCK = 512


@dataclass
class Tape:
    """Bytes that are live, by what they are for, while a step is walked through."""

    live: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """Most bytes that were live at once."""
    at_peak: dict[str, int] = field(default_factory=dict)
    """What they were for."""
    highest: Counter[str] = field(default_factory=Counter)
    """Most bytes that were live at once for each part."""
    moment: str = ""
    """When that was."""
    now: str = ""
    """What is being computed."""
    _total: int = 0

    def add(self, part: str, num_bytes: float) -> int:
        """Allocate.

        Args:
            part: what it is for.
            num_bytes: how much.

        Returns:
            The bytes as allocated, for `free`.
        """
        size = -(-int(num_bytes) // _BLOCK) * _BLOCK
        self.live[part] += size
        self._total += size
        self.highest[part] = max(self.highest[part], self.live[part])
        if self._total > self.peak:
            self.peak, self.at_peak, self.moment = self._total, dict(self.live), self.now
        return size

    def free(self, part: str, *sizes: int) -> None:
        """Free what `add` returned."""
        for size in sizes:
            self.live[part] -= size
            self._total -= size
