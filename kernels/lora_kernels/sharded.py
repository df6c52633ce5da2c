"""Frozen weights of a decoder whose layers torch's FSDP2 holds in shards, one a GPU.

FSDP2 gathers a layer in the hooks of its call, and the fused decoder calls no layer. Here the
layers are gathered in the order in which their weights are asked for: forward from the first to the
last, backward from the last to the first. The layer in use and the next one are whole, the others
are shards. The next is gathered while the GPU computes: at 70B 1.7 GB a layer.

Gathering is collective: all processes must make the same passes. What a single process does between
two passes (saving makes FSDP2 shard its layers) does no harm: each pass begins with shards alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


class ShardedLayers:
    """Which layers of a decoder are whole at the moment.

    Args:
        layers: in order, each under `fully_shard`.
    """

    def __init__(self, layers: Sequence[FSDPModule]) -> None:
        self._layers = layers
        self._whole: set[int] = set()
        self._current: int | None = None
        self._step = 1

    def use(self, index: int) -> None:
        """Make a layer whole, and begin to gather the one that comes next.

        Args:
            index: number of the layer.
        """
        if index == self._current:
            # nothing to do, unless FSDP2 itself has sharded it
            self._layers[index].unshard()
            return
        if self._current is not None and abs(index - self._current) == 1:
            self._step = index - self._current
        following = index + self._step
        if not 0 <= following < len(self._layers):
            # the backward pass turns round here, and finds the layer before still whole
            following = index - self._step
        kept = {index, following} & set(range(len(self._layers)))
        for other in self._whole - kept:
            self._layers[other].reshard()
        self._layers[index].unshard()
        if following in kept:
            self._layers[following].unshard(async_op=True)
        self._whole, self._current = kept, index

    def begin(self) -> None:
        """Begin a pass: every layer is sharded, on every process."""
        for layer in self._layers:
            layer.reshard()
        self._whole, self._current, self._step = set(), None, 1


class ShardedWeight:
    """A frozen weight that is written out whole whenever it is needed.

    Args:
        linear: has it, as a shard or whole.
        layers: gather it.
        index: number of the layer that it is in.
    """

    def __init__(self, linear: nn.Linear, layers: ShardedLayers, index: int) -> None:
        self._linear = linear
        self._layers = layers
        self._index = index
        num_rows, num_columns = linear.weight.shape
        self.shape = (num_rows, num_columns)

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out`, (N, K) with any row stride."""
        self._layers.use(self._index)
        # FSDP2 has put the whole parameter in the place of the shard
        out.copy_(self._linear.weight)


def is_sharded(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is a shard of FSDP2's, by rows."""
    weight = getattr(linear, "weight", None)
    return isinstance(weight, DTensor) and tuple(weight.placements) == (Shard(0),)


def sharding_hook(module: nn.Module, hook: Any) -> bool:
    """Whether a hook of a module is the one by which FSDP2 gathers or shards it."""
    owner = getattr(hook, "__self__", None)
    return isinstance(module, FSDPModule) and owner is module._get_fsdp_state()


def class_before_sharding(part: Any) -> type:
    """Return the class of a part of a model; of one under `fully_shard` the class it had."""
    found = type(part)
    if isinstance(part, FSDPModule) and found.__bases__[0] is FSDPModule:
        # FSDP2 makes a class of the two
        return found.__bases__[1]
    return found
