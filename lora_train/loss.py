"""The loss of a micro-batch: fused where the kernels run the model, else torch's cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_train.attention import packing_kwargs
from lora_train.data.batches import Batch

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion


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
    attention: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.predicting,
        use_cache=False,
        **packing_kwargs(attention, batch.cu_seqlens, batch.max_seqlen),
    ).logits
    return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")
