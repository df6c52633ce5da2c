"""The sizes of a decoder and its adapter that decide about memory and time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_train.config import PeftConfig
from lora_train.errors import UserError
from lora_train.model_size import (
    DECODERS,
    attention_width,
    count_parameters,
    count_trainable,
    linear_ranks,
    linear_shapes,
)

# as `lora_kernels.augmented` lays the groups out
_RANK_COLUMNS_MULTIPLE = 64
_SLOT_MULTIPLE = 16
_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input: one product with their adapters."""

    num_in: int
    """K."""
    nums_out: tuple[int, ...]
    """Outputs of each linear."""
    ranks: tuple[int, ...]
    """Of each linear's adapter; 0: it has none."""

    @property
    def num_out(self) -> int:
        """N, of all linears together."""
        return sum(self.nums_out)

    @property
    def rank_used(self) -> int:
        """Rank columns in use, each adapter's in a slot of whole tiles."""
        return sum(_round_up(rank, _SLOT_MULTIPLE) for rank in self.ranks)

    @property
    def rank_columns(self) -> int:
        """P, what stands in the buffers."""
        return _round_up(self.rank_used, _RANK_COLUMNS_MULTIPLE)

    @property
    def trained(self) -> int:
        """Parameters of the adapters."""
        return sum(
            rank * (self.num_in + num_out)
            for rank, num_out in zip(self.ranks, self.nums_out, strict=True)
        )


@dataclass(frozen=True)
class Shape:
    """A decoder and its adapter. All layers are alike, but for ranks."""

    family: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    attention_width: int
    """Query heads times their width."""
    key_width: int
    """Key heads times their width."""
    head_dim: int
    vocabulary: int
    is_tied: bool
    """Whether the output layer is the embedding."""
    total: int
    """Parameters of the base."""
    trained: int
    """Parameters of the adapter, modules trained in full included."""
    layers: tuple[dict[str, Group], ...]
    """The groups of each layer: qkv, o, gate_up, down."""

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers of all decoder layers."""
        return self.num_layers * sum(
            group.num_in * group.num_out for group in self.layers[0].values()
        )


def shape_of(model: Mapping[str, Any], peft: PeftConfig) -> Shape:
    """Read the sizes from a model's config.json.

    Args:
        model: its content; of a model of several kinds, the text part.
        peft: the adapter.

    Returns:
        The sizes.

    Raises:
        UserError: another kind of model, whose layers are not known here.
    """
    linears, total = linear_shapes(model), count_parameters(model)
    trained, ranks = count_trainable(model, peft), linear_ranks(model, peft)
    if linears is None or total is None or trained is None or ranks is None:
        raise UserError(
            _why_unknown(model, is_known=linears is not None and total is not None),
            hint=f"models that are: {', '.join(DECODERS)}; a short run says it for all: "
            "--max-steps 3 eval.num_generate=0",
        )
    layers = tuple(
        {
            name: Group(
                linears[members[0]][0],
                tuple(linears[member][1] for member in members),
                tuple(of_layer[member] for member in members),
            )
            for name, members in _GROUPS.items()
        }
        for of_layer in ranks
    )
    heads = int(model["num_attention_heads"])
    width = attention_width(model)
    return Shape(
        family=str(model["model_type"]),
        hidden=int(model["hidden_size"]),
        intermediate=int(model["intermediate_size"]),
        num_layers=len(layers),
        num_heads=heads,
        attention_width=width,
        key_width=linears["self_attn.k_proj"][1],
        head_dim=width // heads,
        vocabulary=int(model["vocab_size"]),
        is_tied=bool(model.get("tie_word_embeddings")),
        total=total,
        trained=trained,
        layers=layers,
    )


def _why_unknown(model: Mapping[str, Any], *, is_known: bool) -> str:
    if is_known:
        return "peft.target_modules or peft.modules_to_save name modules whose size is not known"
    kind = model.get("model_type")
    if kind in DECODERS:
        return f"no plan for this {kind} model: its config.json does not say its layers' sizes"
    return f"no plan for a model of type {kind!r}: its layers are not known here"


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
