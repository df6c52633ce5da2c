"""The whole-decoder path for PEFT models of the Llama family: taken where it holds, undone at will.

The decoder's `forward` is replaced on the instance. Weights stay where PEFT and transformers look
for them: `base_layer.weight` becomes a view of the group's buffer (a quantized or sharded one stays
as it is), `lora_A` and `lora_B` are the parameters that are trained. At each call the model is
looked at anew, and whatever the fused path does not do (several adapters, disabled or merged ones,
a cache for generating, an attention mask, hooks) goes the way it went before.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_kernels.augmented import AdaptedLinear, AugmentedGroup, OnDemandWeight
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import DecoderLayer, Sequences
from lora_kernels.families import GROUPS, family_of
from lora_kernels.nf4 import Nf4Weight
from lora_kernels.peft_obstacles import (
    attention_obstacle,
    decoder_of,
    has_hooks,
    is_altered,
    is_nf4,
    linear_of,
)
from lora_kernels.peft_watch import ModelWatch
from lora_kernels.sharded import ShardedLayers, ShardedWeight

logger = logging.getLogger(__name__)

# arguments of the decoder's forward that the fused path understands
_KNOWN_ARGUMENTS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict",
    "num_items_in_batch",
}  # fmt: skip


class FusedDecoder:
    """A decoder whose layers run as one function.

    Args:
        model: a PEFT model for which `decoder_obstacle` found nothing.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.decoder = decoder_of(model)
        [self.adapter] = model.active_adapters
        self.dtype = self.decoder.norm.weight.dtype
        self.device = self.decoder.norm.weight.device
        self._warned: set[str] = set()
        # the adapted linears, in the order of the stack's parameters
        self._lora_layers: list[Any] = []
        # the dropout modules of each group that has any
        self._dropouts: list[tuple[AugmentedGroup, list[Any]]] = []
        # place in the buffer and owner of each dense weight
        self._views: list[tuple[torch.Tensor, Any]] = []
        scratch: dict[tuple[int, int, int], torch.Tensor] = {}
        family = family_of(self.decoder)
        assert family is not None
        own_layers = self.decoder.layers[: self.decoder.config.num_hidden_layers]
        self._sharded: ShardedLayers | None = None
        if isinstance(own_layers[0], FSDPModule):
            self._sharded = ShardedLayers(list(own_layers))
        layers = []
        for index, layer in enumerate(own_layers):
            attention = layer.self_attn
            groups = {
                name: self._group([layer.get_submodule(path) for path in paths], index, scratch)
                for name, paths in GROUPS.items()
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
        self.stack: DecoderStack | None = DecoderStack(
            layers, norm.weight.data, norm.variance_epsilon
        )
        self._watch = ModelWatch(self.decoder, self.adapter, self._lora_layers)
        self.decoder.forward = self._forward
        self._base: Any = model.get_base_model()
        self._base.save_pretrained = self._save_pretrained

    def _group(
        self,
        modules: list[nn.Module],
        index: int,
        scratch: dict[tuple[int, int, int], torch.Tensor],
    ) -> AugmentedGroup:
        linears, dropouts = [], []
        for module in modules:
            base = linear_of(module)
            adapted = AdaptedLinear(
                self._weight(base, index), None if base.bias is None else base.bias.data
            )
            if isinstance(module, LoraLayer) and self.adapter in module.lora_A:
                self._lora_layers.append(module)
                dropouts.append(module.lora_dropout[self.adapter])
                adapted = AdaptedLinear(
                    adapted.weight,
                    adapted.bias,
                    module.lora_A[self.adapter].weight,
                    module.lora_B[self.adapter].weight,
                    module.scaling[self.adapter],
                )
            linears.append(adapted)
        group = AugmentedGroup(linears, self.dtype, self.device, scratch=scratch)
        if any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
            self._dropouts.append((group, dropouts))
        if not group.is_on_demand:
            for module, slot in zip(modules, group.slots, strict=True):
                base = linear_of(module)
                base.weight.data = group.weight_view(slot)
                self._views.append((base.weight.data, base))
        return group

    def _weight(self, base: Any, index: int) -> torch.Tensor | OnDemandWeight:
        if is_nf4(base):
            return Nf4Weight(base.weight)
        if self._sharded is not None:
            return ShardedWeight(base, self._sharded, index)
        return base.weight.data

    def undo(self) -> None:
        """Put the decoder's own forward back and give each weight its own memory again."""
        if self.stack is None:
            return
        del self.decoder.forward, self._base.save_pretrained
        self.stack = None
        if self._sharded is not None:
            self._sharded.begin()
        # a buffer is freed with the last of its views
        while self._views:
            view, base = self._views.pop()
            if base.weight.data_ptr() == view.data_ptr():
                base.weight.data = view.clone(memory_format=torch.contiguous_format)

    def obstacle_now(self) -> str | None:
        """Return what has happened to the model that the fused path does not cover, or None."""
        if self.stack is None:
            return "it was undone"
        return (
            self._watch.obstacle() or attention_obstacle(self.decoder) or self._dropout_obstacle()
        )

    def loss_obstacle_now(self) -> str | None:
        """Return why `loss_sum` cannot stand in for a call of the whole model, or None."""
        head = self.model.get_output_embeddings()
        for module in (self.model, self.model.base_model, self._base, head):
            if is_altered(module):
                return f"{type(module).__name__} has hooks or another forward"
        family = family_of(self.decoder)
        if family is None or not family.is_own(self._base, "ForCausalLM"):
            return f"{type(self._base).__name__} may do more with the hidden states"
        # its forward is replaced by this very class
        if has_hooks(self.decoder):
            return f"{type(self.decoder).__name__} has hooks"
        return self.obstacle_now()

    def _dropout_obstacle(self) -> str | None:
        """Take over the probabilities of this pass, which must be one for each group."""
        for group, dropouts in self._dropouts:
            found = {
                float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
                for dropout in dropouts
            }
            if len(found) > 1:
                return "modules with one input drop out differently"
            [group.dropout_p] = found
            if group.dropout_p >= 1:
                return "everything is dropped"
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
            if inputs_embeds.grad_fn is None and getattr(self._base, "_require_grads_hooks", None):
                # all that asks for a gradient is transformers' hook for checkpointing
                inputs_embeds = inputs_embeds.detach()
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None]
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(torch.int32)
        else:
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
        if self._sharded is not None:
            self._sharded.begin()
        assert self.stack is not None
        self.stack.set_scalings([layer.scaling[self.adapter] for layer in self._lora_layers])
        hidden = inputs_embeds.to(self.dtype).flatten(0, 1)
        return self.stack(
            hidden.contiguous(),
            Sequences(cos, sin, cu_seqlens, length if max_seqlen is None else int(max_seqlen)),
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
        wants_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        reason = self.obstacle_now()
        if reason is None and (input_ids is None) == (inputs_embeds is None):
            reason = "not one of input_ids and inputs_embeds is given"
        if reason is None and attention_mask is not None:
            reason = "an attention mask is given"
        if reason is None and past_key_values is not None:
            reason = "earlier tokens are cached"
        if reason is None and wants_cache:
            reason = "a cache is wanted (use_cache)"
        if reason is None and position_ids is not None and cu_seqlens is None:
            reason = "positions are given without cu_seq_lens_q"
        unknown = [
            name
            for name, value in kwargs.items()
            if name not in _KNOWN_ARGUMENTS and value is not None and value is not False
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
        self.undo()
        return self._base.save_pretrained(*args, **kwargs)

    def _warn(self, reason: str) -> None:
        """Say once that training goes the slow way; generating always does."""
        if torch.is_grad_enabled() and self.decoder.training and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("the fused decoder is not used: %s", reason)

    def _dropout_seed(self) -> int | None:
        """Draw the seed of a pass, from torch's CPU generator as dropout on the CPU would."""
        if not any(group.dropout_p for group, _ in self._dropouts):
            return None
        return int(torch.randint(2**31, ()))

    def _readopt_weights(self) -> None:
        """Copy a weight that was replaced (by merging and unmerging, say) back into its place."""
        for view, base in self._views:
            if base.weight.data_ptr() != view.data_ptr():
                view.copy_(base.weight.data)
                base.weight.data = view
