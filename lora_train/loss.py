"""The loss of a micro-batch: fused where the kernels run the model, else torch's cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_train.attention import packing_kwargs
from lora_train.data.batches import Batch

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion

# of the logits that are widened to fp32 together: 128 MiB with a vocabulary of 128k
_ROWS_AT_ONCE = 256


def loss_sum(model: nn.Module, batch: Batch, fusion: Fusion | None = None) -> Tensor:
    """Cross-entropy summed over the supervised tokens of one micro-batch.

    Only the positions that predict a supervised token go through the language-model head.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        batch: one padding-free row, on the model's device.
        fusion: what of the model the kernels run.

    Returns:
        Scalar, fp32, in nats.
    """
    targets = batch.labels[0, batch.predicting + 1]
    decoder = None if fusion is None else fusion.decoder
    if decoder is not None and decoder.loss_obstacle_now() is None:
        return decoder.loss_sum(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen,
            batch.predicting, targets,
        )  # fmt: skip
    logits = _logits(model, batch)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each supervised token of one micro-batch; no gradient.

    The sum is that of `loss_sum` up to rounding: where kernels run the decoder they run it here
    too, and the head's logits are rounded alike.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        batch: one padding-free row, on the model's device.

    Returns:
        (num_supervised,) fp32, in nats, in the order of `batch.predicting`.
    """
    with torch.no_grad():
        logits = _logits(model, batch)
        targets = batch.labels[0, batch.predicting + 1]
        return torch.cat(
            [
                nn.functional.cross_entropy(some.float(), these, reduction="none")
                for some, these in zip(
                    logits.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True
                )
            ]
        )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the places that predict a supervised token, (num_supervised, V)."""
    attention: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    logits: Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.predicting,
        use_cache=False,
        **packing_kwargs(attention, batch.cu_seqlens, batch.max_seqlen),
    ).logits
    return logits[0]
