"""The whole-decoder path for PEFT models of the Llama family: taken where it holds, undone at will.

The decoder's `forward` is replaced on the instance. Weights stay where PEFT and transformers look
for them: `base_layer.weight` becomes a view of the group's buffer, `lora_A` and `lora_B` are the
parameters that are trained. At each call the state of the adapters is looked at anew, and whatever
the fused path does not do (several adapters, disabled or merged ones, a cache for generating, an
attention mask) goes the way it went before.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_kernels.augmented import AdaptedLinear, AugmentedGroup
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import DecoderLayer, Sequences
from lora_kernels.families import FAMILIES
from lora_kernels.nf4 import Nf4Weight

logger = logging.getLogger(__name__)

_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# arguments of the decoder's forward that the fused path understands
_KNOWN_ARGUMENTS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict",
}  # fmt: skip


class FusedDecoder:
    """A decoder whose layers run as one function.

    Args:
        model: a PEFT model for which `decoder_obstacle` found nothing.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.decoder = _decoder_of(model)
        [self.adapter] = model.active_adapters
        self.dtype = self.decoder.norm.weight.dtype
        self.device = self.decoder.norm.weight.device
        self._warned: set[str] = set()
        # the adapted linears, in the order of the stack's parameters
        self._lora_layers: list[Any] = []
        # place in the buffer and owner of each dense weight
        self._views: list[tuple[torch.Tensor, Any]] = []
        scratch: dict[tuple[int, int, int], torch.Tensor] = {}
        family = FAMILIES[type(self.decoder).__name__]
        layers = []
        for index, layer in enumerate(self.decoder.layers[: self.decoder.config.num_hidden_layers]):
            attention = layer.self_attn
            groups = {
                name: self._group([layer.get_submodule(path) for path in paths], scratch)
                for name, paths in _GROUPS.items()
            }
            layers.append(
                DecoderLayer(
                    index=index,
                    **groups,
                    input_norm=layer.input_layernorm.weight.data,
                    post_attention_norm=layer.post_attention_layernorm.weight.data,
                    norm_eps=layer.input_layernorm.variance_epsilon,
                    num_heads=groups["qkv"].slots[0].rows.stop // attention.head_dim,
                    num_kv_heads=linear_of(attention.k_proj).out_features // attention.head_dim,
                    head_dim=attention.head_dim,
                    attention_scale=attention.scaling,
                    window=family.window(attention),
                    head_norms=family.head_norms(attention),
                )
            )
        norm = self.decoder.norm
        self.stack = DecoderStack(layers, norm.weight.data, norm.variance_epsilon)
        self.decoder.forward = self._forward
        model.get_base_model().save_pretrained = self._save_pretrained

    def _group(
        self, modules: list[nn.Module], scratch: dict[tuple[int, int, int], torch.Tensor]
    ) -> AugmentedGroup:
        linears = []
        for module in modules:
            base = linear_of(module)
            weight = base.weight
            adapted = AdaptedLinear(
                Nf4Weight(weight) if _is_nf4(base) else weight.data,
                None if base.bias is None else base.bias.data,
            )
            if isinstance(module, LoraLayer) and self.adapter in module.lora_A:
                self._lora_layers.append(module)
                adapted = AdaptedLinear(
                    adapted.weight,
                    adapted.bias,
                    module.lora_A[self.adapter].weight,
                    module.lora_B[self.adapter].weight,
                    module.scaling[self.adapter],
                )
            linears.append(adapted)
        group = AugmentedGroup(
            linears, self.dtype, self.device,
            dropout_p=_dropout_p(modules, self.adapter) or 0.0, scratch=scratch,
        )  # fmt: skip
        if not group.is_quantized:
            for module, slot in zip(modules, group.slots, strict=True):
                base = linear_of(module)
                base.weight.data = group.weight_view(slot)
                self._views.append((base.weight.data, base))
        return group

    def undo(self) -> None:
        """Put the decoder's own forward back and give each weight its own memory again."""
        del self.decoder.forward, self.model.get_base_model().save_pretrained
        del self.stack
        # a buffer is freed with the last of its views
        while self._views:
            view, base = self._views.pop()
            if base.weight.data_ptr() == view.data_ptr():
                base.weight.data = view.clone(memory_format=torch.contiguous_format)

    def obstacle_now(self) -> str | None:
        """Return what has happened to the model that the fused path does not cover, or None."""
        if list(self.model.active_adapters) != [self.adapter]:
            return f"the active adapters are {self.model.active_adapters}, not {self.adapter!r}"
        for module in self._lora_layers:
            if module.disable_adapters:
                return "adapters are disabled"
            if module.merged:
                return "adapters are merged"
        norm = self.decoder.norm.weight
        if norm.dtype != self.dtype or norm.device != self.device:
            return "the model was cast or moved after it was fused"
        return None

    def hidden_states(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the decoder.

        Args:
            input_ids: (B, S) int64; None: `inputs_embeds` is given.
            inputs_embeds: (B, S, K).
            position_ids: (B, S) or (1, S) int64; None: from 0 in each row.
            cu_seqlens: borders of packed sequences over the B S tokens; None: each row is one.
            max_seqlen: tokens of the longest sequence; None: S.
            rows: tokens that are read, counted over all rows, (M',) int64; None: all.

        Returns:
            Normed hidden states, (M', K).
        """
        if inputs_embeds is None:
            inputs_embeds = self.decoder.embed_tokens(input_ids)
            # a hook for checkpointing of single layers may have asked for it
            if not any(weight.requires_grad for weight in self.decoder.embed_tokens.parameters()):
                inputs_embeds = inputs_embeds.detach()
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(
                0, batch * length + 1, length, dtype=torch.int32, device=device
            )
        # the module computes in fp32 and rounds to the dtype of what it is given
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rotations = self.decoder.rotary_emb(inputs_embeds.new_empty(0, dtype=wide), position_ids)
        cos, sin = (
            half[..., : half.shape[-1] // 2].expand(batch, -1, -1).flatten(0, 1).contiguous()
            for half in rotations
        )
        self._readopt_weights()
        self.stack.working_copies.set_scales(self._scales())
        hidden = inputs_embeds.to(self.dtype).flatten(0, 1)
        return self.stack(
            hidden.contiguous(),
            Sequences(cos, sin, cu_seqlens, length if max_seqlen is None else max_seqlen),
            rows=rows,
            dropout_seed=self._dropout_seed(),
            checkpointing=self.decoder.training and self.decoder.gradient_checkpointing,
        )

    def loss_sum(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        predicting: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the cross-entropy summed over some tokens of a packed row.

        Args:
            input_ids: (1, T) int64.
            position_ids: (1, T) int64.
            cu_seqlens: borders of the sequences, (sequences + 1,), int32.
            max_seqlen: tokens of the longest sequence.
            predicting: places whose next token counts, (M',) int64, distinct.
            targets: those next tokens, (M',) int64.

        Returns:
            Scalar, fp32, in nats.
        """
        hidden = self.hidden_states(
            input_ids, None, position_ids, cu_seqlens, max_seqlen, predicting
        )
        head = self.model.get_output_embeddings()
        is_plain = type(head) is nn.Linear and not head.weight.requires_grad
        if is_plain and head.weight.dtype == hidden.dtype:
            return linear_cross_entropy(hidden, head.weight, targets, head.bias)
        return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    def _forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stand in for the decoder's forward."""
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        reason = self.obstacle_now()
        if reason is None and attention_mask is not None:
            reason = "an attention mask is given"
        if reason is None and past_key_values is not None:
            reason = "earlier tokens are cached"
        if reason is None and use_cache is not False and self.decoder.config.use_cache:
            reason = "a cache is wanted (use_cache)"
        if reason is None and position_ids is not None and cu_seqlens is None:
            reason = "positions are given without cu_seq_lens_q"
        unknown = [
            name
            for name, value in kwargs.items()
            if name not in _KNOWN_ARGUMENTS and value not in (None, False)
        ]
        if reason is None and unknown:
            reason = f"arguments {', '.join(unknown)} are given"
        if reason is not None:
            self._warn(reason)
            return type(self.decoder).forward(
                self.decoder,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        hidden = self.hidden_states(
            input_ids, inputs_embeds, position_ids, cu_seqlens, kwargs.get("max_length_q")
        )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        return BaseModelOutputWithPast(last_hidden_state=hidden.unflatten(0, tokens.shape[:2]))

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the base model's: transformers does not save views of a wider matrix."""
        logger.info("the base model is being saved: the fused decoder is undone for it")
        base: Any = self.model.get_base_model()
        self.undo()
        return base.save_pretrained(*args, **kwargs)

    def _warn(self, reason: str) -> None:
        """Say once that training goes the slow way; generating always does."""
        if torch.is_grad_enabled() and self.decoder.training and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("the fused decoder is not used: %s", reason)

    def _scales(self) -> list[float]:
        """Return the scale of each working copy, in their order: 1 for A, the scaling for B."""
        return [
            scale for module in self._lora_layers for scale in (1.0, module.scaling[self.adapter])
        ]

    def _dropout_seed(self) -> int | None:
        """Draw the seed of a pass, from torch's CPU generator as dropout on the CPU would."""
        groups = [group for layer in self.stack.layers for group in layer.groups]
        if not self.decoder.training or not any(group.dropout_p for group in groups):
            return None
        return int(torch.randint(2**31, ()))

    def _readopt_weights(self) -> None:
        """Copy a weight that was replaced (by merging and unmerging, say) back into its place."""
        for view, base in self._views:
            if base.weight.data_ptr() != view.data_ptr():
                view.copy_(base.weight.data)
                base.weight.data = view


def decoder_obstacle(model: PeftModel) -> str | None:
    """Return why a model cannot take the whole-decoder path; None if it can.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned.

    Returns:
        The reason, as a sentence without its end.
    """
    decoder = _decoder_of(model)
    if type(decoder).__name__ not in FAMILIES:
        return f"{type(decoder).__name__} is not of the Llama family"
    if "forward" in vars(decoder):
        return "another library has replaced the decoder's forward"
    if decoder.config.hidden_act != "silu":
        return f"its MLP computes {decoder.config.hidden_act}, not silu"
    if getattr(decoder.config, "attention_dropout", 0.0):
        return "attention weights are dropped"
    weight = decoder.norm.weight
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if weight.device.type != "cuda" and not is_interpreted:
        return f"the model is on {weight.device}, and the kernels need a GPU"
    if weight.element_size() != 2 and not is_interpreted:
        return f"its weights are {weight.dtype}, and the kernels are made for bf16 and fp16"
    return _adapter_obstacle(model, decoder) or _weights_obstacle(decoder)


def _adapter_obstacle(model: PeftModel, decoder: Any) -> str | None:
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    [adapter] = model.active_adapters
    projections = {path for paths in _GROUPS.values() for path in paths}
    found = False
    for name, module in decoder.layers.named_modules():
        if type(module).__name__ == "ModulesToSaveWrapper":
            return f"layers.{name} is trained in full"
        if not isinstance(module, LoraLayer):
            continue
        # NUMBER.self_attn.q_proj
        if name.partition(".")[2] not in projections:
            return f"layers.{name} has an adapter"
        if adapter not in module.lora_A:
            continue
        found = True
        if adapter in module.lora_variant:
            return f"layers.{name} is a {type(module.lora_variant[adapter]).__name__}"
        if module.lora_bias[adapter]:
            return f"lora_B of layers.{name} has a bias"
        if module.merged:
            return f"the adapter of layers.{name} is merged"
    if not found:
        return "no layer has an adapter"
    for layer in decoder.layers:
        for paths in _GROUPS.values():
            if _dropout_p([layer.get_submodule(path) for path in paths], adapter) is None:
                return f"{' and '.join(paths)} drop out differently"
    return None


def _weights_obstacle(decoder: Any) -> str | None:
    dtype, device = decoder.norm.weight.dtype, decoder.norm.weight.device
    for name, module in decoder.layers.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"layers.{name} has hooks, which would not be called"
    for layer in decoder.layers:
        for paths in _GROUPS.values():
            bases = [linear_of(layer.get_submodule(path)) for path in paths]
            if len({_is_nf4(base) for base in bases}) > 1:
                return f"{' and '.join(paths)} are not all nf4"
            for path, base in zip(paths, bases, strict=True):
                if not _is_nf4(base) and type(base) is not nn.Linear:
                    return f"{path} is a {type(base).__name__}"
                if not _is_nf4(base) and base.weight.dtype != dtype:
                    return f"{path} is {base.weight.dtype}, the norms are {dtype}"
    for name, parameter in decoder.layers.named_parameters():
        if parameter.device != device:
            return f"layers.{name} is on {parameter.device}, the last norm on {device}"
        if parameter.requires_grad and "lora_" not in name:
            return f"layers.{name} is trained"
    return None


def linear_of(module: nn.Module) -> Any:
    """Return the frozen linear layer of a module that may have an adapter."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _decoder_of(model: PeftModel) -> Any:
    """Return what holds embedding, layers and final norm (`LlamaModel`)."""
    base = model.get_base_model()
    return getattr(base, base.base_model_prefix, base)


def _is_nf4(base: nn.Module) -> bool:
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def _dropout_p(modules: list[nn.Module], adapter: str) -> float | None:
    """Return the one probability with which a group drops its input; None if they differ."""
    found = {
        float(getattr(module.lora_dropout[adapter], "p", 0.0))
        for module in modules
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    return None if len(found) > 1 else next(iter(found), 0.0)
