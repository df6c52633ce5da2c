"""Attention over packed rows: no padding, no mask, and no look from one example into another.

Dimensions: T tokens of a packed row, H query heads, G key/value heads (G divides H), D head width.

`lora_varlen` is registered with transformers' `AttentionInterface` and takes the sequence borders
as keyword arguments under the names that transformers itself uses for flash attention.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lora_train.errors import RunError, UserError

logger = logging.getLogger(__name__)

VARLEN = "lora_varlen"

# Shorter sequences attend faster in fp32 on CPUs, forward and backward: 1,024 tokens in sequences
# of 100 take 11 ms of one core instead of 31 (9 heads, 3 key/value heads, width 64, torch 2.13, a
# CPU with avx512_bf16 and amx_bf16); in sequences of 256 about the same, in one 52 instead of 32.
_CPU_FP32_BELOW_TOKENS = 256

# layer types that are attention over earlier tokens and nothing else; recurrent ones carry a state
_PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class AttentionChoice:
    """The attention implementation, and why."""

    name: str
    """Name in transformers' AttentionInterface: lora_varlen, sdpa or eager."""
    reason: str
    """One line for the log."""


def packing_kwargs(name: str, cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, Any]:
    """Return what a packed row needs besides its position ids, as arguments of `model(...)`.

    Args:
        name: the attention implementation of the model.
        cu_seqlens: borders of the sequences in the row, `(sequences + 1,)`, int32, from 0 to T.
        max_seqlen: length of the longest sequence, in tokens.

    Returns:
        The arguments; none for sdpa and eager, which read the borders off the position ids.
    """
    if name != VARLEN:
        return {}
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each sequence of a packed row.

    Args:
        module: the attention layer; not read.
        query: `(1, H, T, D)`.
        key: `(1, G, T, D)`.
        value: `(1, G, T, D)`.
        attention_mask: must be None; the borders say everything.
        scaling: factor on the scores; None is 1 / sqrt(D).
        dropout: probability of dropping an attention weight.
        sliding_window: tokens that a token sees, itself included; None is all earlier ones.
        cu_seq_lens_q: borders of the sequences, `(sequences + 1,)`, int32, from 0 to T.
        max_length_q: length of the longest sequence, in tokens.
        **kwargs: whatever else the model passes; what would change the result is refused.

    Returns:
        The attended values, `(1, T, H, D)`, and None for the weights.

    Raises:
        RunError: the call cannot be answered rightly without borders or with these arguments.
    """
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if cu_seq_lens_q is None or max_length_q is None:
        unknown.append("no cu_seq_lens_q and max_length_q")
    if attention_mask is not None:
        unknown.append("an attention mask")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        unknown.append(f"queries {tuple(query.shape)} for keys {tuple(key.shape)}")
    if unknown:
        raise RunError(
            f"attention {VARLEN} was called with {', '.join(unknown)}",
            hint="set model.attn_implementation=sdpa",
        )
    assert cu_seq_lens_q is not None and max_length_q is not None
    # a norm with fp32 weights leaves fp32 queries and keys beside bf16 values
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _flash(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    return _loop(query, key, value, scaling, sliding_window, dropout, cu_seq_lens_q), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling}
    # (left, right): a window counts the token itself, `left` does not
    options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    # torch 2.13 asks for it; 2.11 shares key/value heads without being asked
    if query.shape[1] != key.shape[1] and "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = True
    # (T, H, D)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    if is_deterministic:
        q, k, v = _RelaxAfter.apply(q, k, v)
    out = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        **options,
    )
    assert isinstance(out, torch.Tensor)
    return (_BeStrictBefore.apply(out) if is_deterministic else out).unsqueeze(0)


class _BeStrictBefore(torch.autograd.Function):
    """Identity whose backward makes torch's deterministic mode strict.

    The flash backward adds up the gradients of long sequences in any order unless that mode is
    strict (with `warn_only` it warns and goes on). Strict everywhere, it would refuse operations
    that have no deterministic form, so it is strict around this one: forward + backward of
    4 x 2048 tokens, 32/8 heads of 128, 2.02 -> 2.29 ms (H200).
    """

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.use_deterministic_algorithms(True)
        return gradient


class _RelaxAfter(torch.autograd.Function):
    """Identity on the inputs whose backward, which comes after the flash backward, relaxes it."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return gradients


def _loop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Attend one sequence after another: the cost is the sum of the squares, not T squared."""
    is_grouped = query.shape[1] != key.shape[1]
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for q, k, v in zip(
        query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2),
        strict=True,
    ):  # fmt: skip
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        if not q.is_cuda and length < _CPU_FP32_BELOW_TOKENS:
            q, k, v = q.float(), k.float(), v.float()
        # or autocast would turn them back
        with torch.autocast(q.device.type, enabled=False):
            out = scaled_dot_product_attention(
                q, k, v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=is_grouped,
            )  # fmt: skip
        outputs.append(out.to(value.dtype))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def choose_attention(
    requested: str, config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> AttentionChoice:
    """Return the attention implementation for a model.

    Args:
        requested: `model.attn_implementation`: auto, varlen, sdpa or eager.
        config: the model's own configuration.
        model_class: the class that will be loaded.

    Returns:
        lora_varlen where the model takes it, else sdpa (eager for models without), and why.

    Raises:
        UserError: varlen is asked for and this model does not take it.
    """
    if requested in ("sdpa", "eager"):
        return AttentionChoice(requested, "as asked")
    obstacle = _varlen_obstacle(config.get_text_config(), model_class)
    if obstacle is None:
        return AttentionChoice(VARLEN, "packed rows need neither padding nor a mask")
    if requested == "varlen":
        raise UserError(
            f"model.attn_implementation=varlen, but {model_class.__name__} {obstacle}",
            hint="set model.attn_implementation=auto",
        )
    # a few models (Gemma 2: softcapping) have no sdpa either
    name = "sdpa" if model_class._supports_sdpa else "eager"
    return AttentionChoice(name, f"{model_class.__name__} {obstacle}")


def _varlen_obstacle(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    """Return why a model cannot use `lora_varlen`, as the end of a sentence; None if it can."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if not getattr(config, "is_causal", True):
        return "is not causal"
    if not model_class._can_set_attn_implementation():
        return "does not go through transformers' attention interface"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "caps its attention scores (attn_logit_softcapping)"
    if getattr(config, "attention_dropout", 0.0):
        return f"drops attention weights (attention_dropout={config.attention_dropout})"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layer_types <= _PLAIN_LAYER_TYPES:
        return f"has layers of type {', '.join(sorted(layer_types - _PLAIN_LAYER_TYPES))}"
    source = inspect.getsource(sys.modules[model_class.__module__])
    if "s_aux=" in source:
        return "has attention sinks"
    slides = "sliding_attention" in layer_types or getattr(config, "sliding_window", None)
    if slides and "sliding_window=" not in source:
        return "says its sliding window in a mask only"
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if hasattr(config, "v_head_dim") or hasattr(config, "kv_lora_rank"):
        return "has values of another width than its keys"
    # limits of the flash attention kernels in torch
    if torch.cuda.is_available() and (head_dim > 256 or head_dim % 8):
        return f"has heads of width {head_dim} (multiples of 8 up to 256 are taken)"
    return None


@contextlib.contextmanager
def generation_attention(model: torch.nn.Module) -> Iterator[None]:
    """Give a model, inside the block, the attention and the cache that generating needs.

    Args:
        model: a transformers model or a PeftModel around one.
    """
    base = _transformers_model(model)
    attention, use_cache = base.config._attn_implementation, base.config.use_cache
    if attention == VARLEN:
        base.set_attn_implementation("sdpa")
    base.config.use_cache = True
    try:
        yield
    finally:
        base.config.use_cache = use_cache
        if attention == VARLEN:
            base.set_attn_implementation(attention)


@torch.no_grad()
def check_isolation(
    model: torch.nn.Module, vocab_size: int, device: torch.device, *, is_fused: bool = False
) -> None:
    """Prove with this very model that a packed example does not see the one before it.

    Two sequences are packed twice with different tokens in the first; the logits of the second must
    not change by a single bit, since every operation has the same shapes both times.

    Args:
        model: a transformers model or a PeftModel around one, as it will be trained.
        vocab_size: tokens in the embedding.
        device: where the model is.
        is_fused: the fused decoder runs, which wants the borders whatever the attention.

    Raises:
        RunError: they do change.
    """
    lengths = (19, 13)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    other = tokens.clone()
    other[: lengths[0]] = (tokens[: lengths[0]] + vocab_size // 2) % vocab_size
    positions = torch.cat([torch.arange(length) for length in lengths])
    borders = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)

    base = _transformers_model(model)
    attention = VARLEN if is_fused else base.config._attn_implementation
    kwargs = packing_kwargs(attention, borders, max(lengths))
    was_training = model.training
    # without dropout, or the two would differ by chance
    model.eval()
    try:
        first, second = (
            model(
                input_ids=row.unsqueeze(0).to(device),
                position_ids=positions.unsqueeze(0).to(device),
                **kwargs,
            ).logits[0, lengths[0] :]
            for row in (tokens, other)
        )
    finally:
        model.train(was_training)
    difference = (first - second).abs().max().item()
    # experts share one batched product, whose rounding may depend on who else went to them
    rounding = 2**-6 * first.abs().max().item() if _has_experts(base.config) else 0.0
    if not first.isfinite().all():
        raise RunError(
            "the model's logits are not finite before training: weights of the base model or of "
            "the checkpoint are damaged",
            hint="fetch the model again; after a run whose loss was not finite, remove its newest "
            "checkpoint's folder",
        )
    if difference > rounding:
        raise RunError(
            f"packed examples are not isolated in {type(base).__name__} with attention "
            f"{base.config._attn_implementation}: changing one example moved the logits of the "
            f"next by {difference:.3g}",
            hint="set data.packed_sequence=false and data.micro_batch_size=1",
        )


def _transformers_model(model: torch.nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _has_experts(config: PretrainedConfig) -> bool:
    text_config = config.get_text_config()
    return any(hasattr(text_config, name) for name in ("num_experts", "num_local_experts"))


def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN_PARAMETERS = _varlen_parameters()

AttentionInterface.register(VARLEN, varlen_attention)
