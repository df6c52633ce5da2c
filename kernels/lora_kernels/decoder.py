"""A stack of decoder layers as one autograd function: no graph inside, nothing kept twice.

The function takes the embedded tokens and every A and B of the adapters, and returns the normed
hidden states of the tokens that are read. Its backward walks the layers from the last to the first
and frees what each kept as soon as it is spent. With checkpointing a layer keeps its input alone
and is run again, without its last product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from lora_kernels.arguments import statistics_dtype
from lora_kernels.decoder_layer import (
    DecoderLayer,
    Saved,
    Sequences,
    draw_dropout,
    layer_backward,
    layer_forward,
)
from lora_kernels.offload import HostStack
from lora_kernels.refresh import Copy, WorkingCopies
from lora_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward

Keeping = Literal["everything", "inputs", "nothing"]
"""What a forward pass keeps of each layer for the backward pass."""
GradientSink = Callable[[list[torch.Tensor], list[torch.Tensor]], None]
"""Takes parameters of one layer and their gradients, to be added to what it has."""


class DecoderStack:
    """The layers of a model and its final norm.

    Args:
        layers: in order, at least one.
        final_norm: weight of the norm after the last, (K,).
        final_norm_eps: of that norm.
    """

    def __init__(
        self, layers: list[DecoderLayer], final_norm: torch.Tensor, final_norm_eps: float
    ) -> None:
        self.layers = layers
        self.final_norm = final_norm
        self.final_norm_eps = final_norm_eps
        self.groups = [group for layer in layers for group in layer.groups]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters()]
        self.working_copies = WorkingCopies(self._copies())
        # gets the gradients of each layer while those of the layers before it are computed; None:
        # autograd gets them all at the end
        self.gradient_sink: GradientSink | None = None

    def _copies(self) -> list[Copy]:
        return [copy for group in self.groups for copy in group.copies()]

    @property
    def scalings(self) -> list[float]:
        """Of all adapted linears, in the order of `parameters`."""
        return [scaling for group in self.groups for scaling in group.scalings]

    def set_scalings(self, scalings: list[float]) -> None:
        """Set them, for the passes from now on.

        Args:
            scalings: one for each adapted linear.
        """
        if scalings == self.scalings:
            return
        remaining = iter(scalings)
        for group in self.groups:
            group.scalings = [next(remaining) for _ in group.scalings]
        self.working_copies.set_scales([copy.scale for copy in self._copies()])

    def __call__(
        self,
        hidden: torch.Tensor,
        sequences: Sequences,
        *,
        rows: torch.Tensor | None = None,
        dropout_seed: int | None = None,
        checkpointing: bool = False,
    ) -> torch.Tensor:
        """Run the stack.

        Args:
            hidden: embedded tokens, (M, K), in the dtype of the working copies.
            sequences: which tokens see which, and their rotations.
            rows: tokens whose output is read, (M',) int64, distinct; None: all.
            dropout_seed: of this pass's dropout, in [0, 2^31); None: nothing is dropped.
            checkpointing: keep a layer's input alone, and run the layer again in the backward.

        Returns:
            (M', K), normed; differentiable in `hidden` and in the adapters' parameters.
        """
        # at each pass, as parameters may be written in ways that leave no trace: 168 MB are read
        # and 84 written at 8B and rank 16
        self.working_copies.refresh()
        # inside of the function no gradient is recorded and nobody can ask
        keeping: Keeping = "everything" if torch.is_grad_enabled() else "nothing"
        if keeping == "everything" and checkpointing:
            keeping = "inputs"
        with torch.autocast(hidden.device.type, enabled=False):
            return _DecoderFunction.apply(
                hidden, self, sequences, rows, dropout_seed, keeping, *self.parameters
            )


class _DecoderFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        stack: DecoderStack,
        sequences: Sequences,
        rows: torch.Tensor | None,
        dropout_seed: int | None,
        keeping: Keeping,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        kept: list[Saved] = []
        inputs = HostStack(
            hidden.device,
            len(stack.layers) - 1 if keeping == "inputs" else 0,
            hidden.numel() * hidden.element_size(),
        )
        residual, delta = hidden, None
        for layer in stack.layers:
            is_last = layer is stack.layers[-1]
            residual, delta, saved = layer_forward(
                layer, sequences, residual, delta, draw_dropout(layer, dropout_seed),
                rows=rows if is_last else None,
            )  # fmt: skip
            # the last layer's turn comes first: keeping it whole costs no memory at the peak
            if keeping == "everything" or (keeping == "inputs" and is_last):
                kept.append(saved)
            elif keeping == "inputs":
                inputs.put(saved.r1)
            del saved
        out = torch.empty_like(residual)
        rstd = out.new_empty(len(out), dtype=statistics_dtype(out.dtype))
        add_rms_norm_forward(
            residual, delta, stack.final_norm, stack.final_norm_eps, out, None, delta, rstd
        )
        if keeping != "nothing":
            ctx.state = (sequences, rows, dropout_seed, kept, inputs, delta, rstd)
            ctx.stack, ctx.scalings = stack, stack.scalings
            ctx.dropout_ps = [group.dropout_p for group in stack.groups]
            ctx.versions = [parameter._version for parameter in parameters]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # called inside of an autocast block, it would cast the products
        with torch.autocast(d_out.device.type, enabled=False):
            return _backward(ctx, d_out)


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.state is None:
        raise RuntimeError(
            "backward through the decoder a second time: what it kept is freed as it goes"
        )
    stack: DecoderStack = ctx.stack
    if ctx.versions != [parameter._version for parameter in stack.parameters]:
        raise RuntimeError(
            "adapter weights have been modified by an inplace operation between the forward "
            "and the backward pass"
        )
    if ctx.scalings != stack.scalings:
        stack.set_scalings(ctx.scalings)
        stack.working_copies.refresh()
    for group, p in zip(stack.groups, ctx.dropout_ps, strict=True):
        group.dropout_p = p
    sequences, rows, dropout_seed, kept, inputs, residual, rstd = ctx.state
    ctx.state = None
    needs_hidden = ctx.needs_input_grad[0]
    below = stack.layers[-1].down
    width = residual.shape[1] + below.rank_columns
    dr_aug: torch.Tensor | None = d_out.new_empty(len(residual), width)
    assert dr_aug is not None
    rms_norm_backward(
        d_out.contiguous(), residual, rstd, stack.final_norm, None, dr_aug, below.sb_or_none
    )
    del residual, d_out
    gradients: list[torch.Tensor | None] = []
    inputs.prefetch()
    for position in reversed(range(len(stack.layers))):
        layer, is_first = stack.layers[position], position == 0
        dropout = draw_dropout(layer, dropout_seed)
        if kept:
            saved = kept.pop()
        else:
            r1 = inputs.pop()
            inputs.prefetch()
            saved = layer_forward(layer, sequences, r1, None, dropout, recompute=True)[2]
            del r1
        assert dr_aug is not None
        dr_aug, layer_gradients = layer_backward(
            layer, None if is_first else stack.layers[position - 1].down, sequences, saved,
            dr_aug, dropout, rows=rows if position == len(stack.layers) - 1 else None,
            needs_input_grad=needs_hidden or not is_first,
        )  # fmt: skip
        del saved
        if stack.gradient_sink is None:
            gradients = [*layer_gradients, *gradients]
        else:
            parameters = [parameter for group in layer.groups for parameter in group.parameters()]
            stack.gradient_sink(parameters, layer_gradients)
            gradients += [None] * len(layer_gradients)
    return dr_aug if needs_hidden else None, None, None, None, None, None, *gradients
