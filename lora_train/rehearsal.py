"""What a run launches, without a GPU and without its weights: for compiling ahead of time.

The run's own code is called, on a model with the widths of the real one, three layers and memory
that nobody has written. Which kernels that compiles, and under which keys, is what the run will
look up; only the products between kernels are left out, as they would take minutes on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_kernels import self_check
from lora_kernels.peft_bridge import Fusion
from lora_kernels.peft_decoder import FusedDecoder
from lora_train.adapter import attach_adapter
from lora_train.attention import VARLEN, check_isolation
from lora_train.config import Config
from lora_train.data.batches import IGNORED_LABEL, Batch
from lora_train.errors import RunError
from lora_train.loss import loss_sum

# the first layer, the last and those between launch with different arguments
_NUM_LAYERS = 3
# bitsandbytes' own
_NF4_BLOCK, _NESTED_BLOCK = 64, 256
# Lengths of sequences and how many tokens count in the loss. Token numbers that every block size
# divides and such that none does; sequences that the two entries of attention_tiles are for.
_ROWS = (((128, 128), 128), ((3,) * 74 + (29,), 77))


def rehearse(config: Config, dimensions: Mapping[str, Any]) -> None:
    """Launch what a run launches up to its end, once each.

    Args:
        config: the run; `model.quantization`, `peft` and `trainer` are read.
        dimensions: of its model, such as those in `known_models.MODELS`.
    """
    base = _base_model(config, dimensions)
    model = attach_adapter(base, config)
    if config.trainer.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with _without_products():
        decoder = FusedDecoder(model)
        fusion = Fusion(model, decoder, None, [], {})
        fusion.self_check()
        # it judges the results, and there are none
        with contextlib.suppress(RunError):
            check_isolation(model, dimensions["vocab_size"], base.device, is_fused=True)
        for lengths, num_supervised in _ROWS:
            _train_and_validate(model, _row(lengths, num_supervised), fusion)


def _train_and_validate(model: PeftModel, batch: Batch, fusion: Fusion) -> None:
    assert fusion.decoder is not None
    obstacle = fusion.decoder.loss_obstacle_now()
    # or the launches would be another path's
    assert obstacle is None, obstacle
    model.train()
    loss_sum(model, batch, fusion).backward()
    model.eval()
    with torch.no_grad():
        loss_sum(model, batch, fusion)


def _base_model(config: Config, dimensions: Mapping[str, Any]) -> PreTrainedModel:
    options = {**dimensions, "num_hidden_layers": _NUM_LAYERS}
    model_config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.bfloat16, attn_implementation=VARLEN
        )
        if config.model.quantization == "nf4":
            for module in model.model.layers.modules():
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(module, name, _nf4_linear(child, config))
    # pages of memory that nobody writes take none
    model.to_empty(device="cpu")
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _nf4_linear(linear: nn.Linear, config: Config) -> nn.Module:
    """Return a layer that is quantized, as far as its tensors tell."""
    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )  # fmt: skip
    num_blocks = -(-linear.weight.numel() // _NF4_BLOCK)
    is_nested = config.model.double_quantization

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    state2 = offset = None
    if is_nested:
        offset = empty()
        state2 = QuantState(
            empty(-(-num_blocks // _NESTED_BLOCK)), code=empty(256), blocksize=_NESTED_BLOCK
        )
    state = QuantState(
        empty(num_blocks, dtype=torch.uint8 if is_nested else torch.float32),
        shape=linear.weight.shape, code=empty(16), blocksize=_NF4_BLOCK, quant_type="nf4",
        dtype=torch.bfloat16, offset=offset, state2=state2,
    )  # fmt: skip
    quantized.weight = bitsandbytes.nn.Params4bit(
        empty(linear.weight.numel() // 2, 1, dtype=torch.uint8),
        requires_grad=False, quant_type="nf4", quant_state=state, bnb_quantized=True,
    )  # fmt: skip
    return quantized


def _row(lengths: Sequence[int], num_supervised: int) -> Batch:
    num_tokens = sum(lengths)
    input_ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    predicting = torch.arange(num_supervised)
    labels[0, predicting + 1] = 0
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        predicting=predicting,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        num_supervised=num_supervised,
    )


@contextlib.contextmanager
def _without_products() -> Iterator[None]:
    """Make matrix products, inside the block, give memory of their result's shape."""

    def mm(
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if out is not None:
            return out
        return left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype or left.dtype)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def reference(
        stack: Any, hidden: torch.Tensor, sequences: Any, parameters: list[torch.Tensor]
    ) -> torch.Tensor:
        # of everything that the check asks a gradient of
        return hidden + sum(parameter.sum() for parameter in parameters)

    with (
        mock.patch.object(torch, "mm", mm),
        mock.patch.object(nn.functional, "linear", linear),
        mock.patch.object(self_check, "reference_decoder", reference),
    ):
        yield
