"""The sum of the trained parameters' gradients over the processes, while they are being computed.

All gradients are views of one flat fp32 buffer, in the order in which a backward pass ends with
them: the last layers first. It travels in a few chunks, each from the moment when all of its
gradients are final, so that all but the last one travel beside the backward pass. A few numbers,
such as the loss, go along behind the last gradient: the GPUs wait for each other once a step. (A
wish to stop is agreed on elsewhere, through gloo on the CPU.)

    gradient_sum.zero()
    for batch in batches:
        with gradient_sum.overlapping(batch is batches[-1]):
            loss_of(batch).backward()
    extra = gradient_sum.finish(extra)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_kernels.decoder import DecoderStack

# 7 chunks at 8B and rank 16: large enough for the full bandwidth, and the last one, beside which
# nothing is computed, is small
_CHUNK_BYTES = 25 * 2**20


@dataclass
class _Chunk:
    """A contiguous part of the buffer, which travels at once."""

    part: Tensor
    parameters: list[nn.Parameter]
    missing: set[Tensor] = field(default_factory=set)
    """Those whose gradient is not final in this step."""
    handle: dist.Work | None = None
    """Of its travel, once that has begun."""


class GradientSum:
    """Sums gradients over the processes of a group; one process keeps its own and sums nothing.

    Args:
        parameters: those that are trained, fp32, on one device, in the order of the forward pass
            (another order costs speed alone); the same on every process.
        num_extra: numbers that go along.
        decoder: a fused decoder that computes gradients of some of them; from now on it hands them
            over layer by layer, where autograd would see them at the end of the pass.
        process_group: None: all processes.
        chunk_bytes: least size of a chunk; the last may be smaller.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        num_extra: int,
        decoder: DecoderStack | None = None,
        process_group: dist.ProcessGroup | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        self._parameters = list(parameters)
        self._group = process_group
        self._is_last = False
        self._chunks: list[_Chunk] = []
        if not dist.is_initialized() or dist.get_world_size(process_group) == 1:
            # autograd makes the gradients when it comes to them: a buffer would be there during
            # the forward pass, too
            return
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        members: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(parameters):
            if 4 * sum(_sizes(members[-1])) >= chunk_bytes:
                members.append([])
            members[-1].append(parameter)
        ordered = [parameter for chunk in members for parameter in chunk]
        sizes = [*_sizes(ordered), num_extra]
        self._buffer = torch.zeros(sum(sizes), device=parameters[0].device)
        *views, self._extra = self._buffer.split(sizes)
        self._views: dict[Tensor, Tensor] = {
            parameter: view.view_as(parameter)
            for parameter, view in zip(ordered, views, strict=True)
        }
        sizes = [sum(_sizes(chunk)) for chunk in members]
        sizes[-1] += num_extra
        self._chunks = list(map(_Chunk, self._buffer.split(sizes), members))
        self._chunk_of: dict[Tensor, _Chunk] = {
            parameter: chunk for chunk in self._chunks for parameter in chunk.parameters
        }
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._is_final)
        if decoder is not None:
            decoder.gradient_sink = self._take

    def zero(self) -> None:
        """Begin a step: no gradients yet, on several processes zeros.

        So a parameter without a gradient here, such as an expert that got no token, counts as zero
        for the others, which may have one.
        """
        if not self._chunks:
            for parameter in self._parameters:
                parameter.grad = None
            return
        self._buffer.zero_()
        for parameter in self._parameters:
            parameter.grad = self._views[parameter]
        for chunk in self._chunks:
            chunk.missing, chunk.handle = set(chunk.parameters), None

    @contextmanager
    def overlapping(self, is_last: bool) -> Iterator[None]:
        """Surround a backward pass.

        Args:
            is_last: of this step, on this process: what it ends with is summed at once. In a step
                without such a pass `finish` sums everything.
        """
        self._is_last = is_last
        try:
            yield
        finally:
            self._is_last = False

    def finish(self, extra: Tensor) -> Tensor:
        """Sum what has not been summed, and wait (a GPU's stream does, not the host).

        Args:
            extra: numbers that go along, (num_extra,), of this process.

        Returns:
            Their sums, fp32, until the next `zero`; every parameter's `grad` is summed, too.
        """
        if not self._chunks:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return extra
        for parameter in self._parameters:
            assert parameter.grad is self._views[parameter], "a gradient left the buffer"
        self._extra.copy_(extra)
        for chunk in self._chunks:
            self._start(chunk)
        for chunk in self._chunks:
            assert chunk.handle is not None
            chunk.handle.wait()
        return self._extra

    def _start(self, chunk: _Chunk) -> None:
        if chunk.handle is None:
            chunk.handle = dist.all_reduce(chunk.part, group=self._group, async_op=True)

    def _is_final(self, parameter: Tensor) -> None:
        """Start the chunks that wait for nothing any more; autograd calls it, with no gradient too.

        In the order of the buffer, as all processes must start the same ones: a parameter that the
        pass does not reach holds back all behind it, until `finish`.
        """
        if not self._is_last:
            return
        self._chunk_of[parameter].missing.discard(parameter)
        # the last one waits for the numbers that go along
        for chunk in self._chunks[:-1]:
            if chunk.missing:
                break
            self._start(chunk)

    def _take(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Add the gradients of a layer, as autograd would have, in one launch."""
        found = {
            parameter: gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if parameter in self._views  # the others are frozen
        }
        if not found:
            return
        assert all(self._chunk_of[parameter].handle is None for parameter in found)
        torch._foreach_add_([self._views[parameter] for parameter in found], list(found.values()))
        for parameter in found:
            self._is_final(parameter)


def _sizes(parameters: Sequence[nn.Parameter]) -> list[int]:
    return [parameter.numel() for parameter in parameters]
