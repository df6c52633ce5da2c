"""The proof of a merge: base with adapter, and merged model, on the same rows.

    KL(p || q) = sum over the vocabulary of p (log p - log q)

with p of base and adapter, q of the merged model, at each supervised position. One model is in
memory at a time; the first's logits are kept. In fp32 where that fits, so that what is measured is
the rounding of the sum to the base's type, and not that of the arithmetic.

That each weight is the right one is `weight_check`'s part. This measures what rounding them costs,
and catches what is no weight: a wrong configuration, or tensors that are loaded as something else.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lora_train.adapter import load_adapter
from lora_train.attention import packing_kwargs
from lora_train.config import ModelConfig
from lora_train.data.batches import Batch
from lora_train.device import describe_device
from lora_train.evaluation.progress import Countdown
from lora_train.merge.proof_inputs import ProofInputs
from lora_train.model import load_base_model

# of logits that are widened together: 128 MiB with a vocabulary of 128k
_POSITIONS_AT_ONCE = 256

# The mean KL that a right merge may have, in nats. Seen with the quickstart's adapter in fp32: 7e-4
# after 4 steps, 4e-5 after 12, 5e-6 after 130; it is a small model with a high learning rate. With
# a rotary base of 1e4 in place of 1e5 in the configuration it is 5e-2; with one of 30 layers'
# projections left out 8e-4, which only `weight_check` finds.
_MOST_KL = 5e-3
# ... and as a share of what the adapter does, the mean KL of the base alone: more is lost where
# most updates are below half the distance of the base's numbers.
_MOST_OF_EFFECT = 0.1
# ... unless it is no more than the arithmetic's own rounding, which is at other places in the two
# models: up to 5e-4 with the quickstart in bf16.
_ARITHMETIC_KL = {torch.float32: 1e-7, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Comparison:
    """How far one model is from another, over the supervised positions."""

    mean_kl: float
    """In nats."""
    max_kl: float
    max_logit_difference: float
    argmax_agreement: float
    """Share of positions whose likeliest token is the same, 0..1."""


@dataclass(frozen=True)
class Proof:
    """What was measured."""

    precision: str
    """fp32 or bf16: the arithmetic."""
    device: str
    num_positions: int
    base_loss: float
    """Mean over the positions, in nats; of the base alone."""
    adapter_loss: float
    """Of base and adapter."""
    merged_loss: float
    merged: Comparison
    """Merged model against base and adapter."""
    effect: Comparison
    """Base alone against base and adapter: what the adapter does."""
    trained_loss: float | None
    """Of base in 4 bit and adapter, as trained; None: it was not."""
    trained: Comparison | None
    """Merged model against it."""
    kl_limit: float
    """For the mean KL of the merged model."""

    @property
    def failure(self) -> str | None:
        """Why the merge is not proven; None: it is."""
        mean_kl, effect = self.merged.mean_kl, self.effect.mean_kl
        if mean_kl <= self.kl_limit:
            return None
        found = f"mean KL {mean_kl:.1e}, at most {self.kl_limit:.1e} is allowed"
        if mean_kl <= _MOST_KL:
            found += (
                f": {mean_kl / effect:.0%} of what the adapter does ({effect:.1e}) is lost, its "
                "updates are smaller than the steps between the base's weights; serve it beside "
                "the base"
            )
        return found  # also where it is not a number

    def to_dict(self) -> dict[str, Any]:
        """Return what merge_proof.json holds of it."""
        return asdict(self)


def kl_limit(effect: float, dtype: torch.dtype) -> float:
    """Return the highest mean KL that rounding the merged weights explains.

    Args:
        effect: mean KL of the base alone, in nats: what the adapter does.
        dtype: of the arithmetic.

    Returns:
        The limit, in nats.
    """
    return min(_MOST_KL, max(_MOST_OF_EFFECT * effect, _ARITHMETIC_KL[dtype]))


def prove(
    base: ModelConfig,
    adapter: Path,
    merged: ModelConfig,
    inputs: ProofInputs,
    *,
    quantized: ModelConfig | None,
) -> Proof:
    """Compare the merged model with base and adapter.

    Args:
        base: the base, unquantized.
        adapter: folder in PEFT's format.
        merged: the merged model.
        inputs: what to compare on, where and in which arithmetic.
        quantized: the base as it was trained on, in 4 bit; None: it was not.

    Returns:
        The measurements.

    Raises:
        UserError: a model cannot be loaded.
        torch.OutOfMemoryError: one does not fit.
    """
    with_adapter, alone, as_trained, as_merged, against_trained = (_Tally() for _ in range(5))
    reference: list[Tensor] = []
    trained: list[Tensor] = []
    for answer in _answers("base, and with adapter", base, adapter, inputs):
        assert answer.without_adapter is not None
        reference.append(answer.logits)
        with_adapter.add(answer.logits, answer.targets)
        alone.add(answer.without_adapter, answer.targets, answer.logits)
    if quantized is not None:
        for answer in _answers("4-bit base, and with adapter", quantized, adapter, inputs):
            trained.append(answer.logits)
            as_trained.add(answer.logits, answer.targets)
    for row, answer in enumerate(_answers("merged model", merged, None, inputs)):
        as_merged.add(answer.logits, answer.targets, reference[row])
        if trained:
            against_trained.add(answer.logits, answer.targets, trained[row])
    effect = alone.comparison
    return Proof(
        precision="fp32" if inputs.dtype == torch.float32 else "bf16",
        device=describe_device(inputs.device),
        num_positions=as_merged.num_positions,
        base_loss=alone.loss,
        adapter_loss=with_adapter.loss,
        merged_loss=as_merged.loss,
        merged=as_merged.comparison,
        effect=effect,
        trained_loss=as_trained.loss if trained else None,
        trained=against_trained.comparison if trained else None,
        kl_limit=kl_limit(effect.mean_kl, inputs.dtype),
    )


@dataclass(frozen=True)
class _Answer:
    """What a model answers to a row, on the CPU."""

    targets: Tensor
    """The tokens to predict, (positions,)."""
    logits: Tensor
    """(positions, V), in the type of the arithmetic."""
    without_adapter: Tensor | None
    """The same of the base alone."""


@torch.no_grad()
def _answers(
    what: str, source: ModelConfig, adapter: Path | None, inputs: ProofInputs
) -> Iterator[_Answer]:
    """Load a model and yield its answers; it is out of memory when they are all taken."""
    # how it attends was said when the run was made
    logging.getLogger("lora_train.model").setLevel(logging.WARNING)
    # held by this frame alone: with a second model beside it the largest ones would not fit
    model: Any = load_base_model(source, inputs.dtype, inputs.device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.eval()
    console = Console(stderr=True)
    with Countdown(console, f"proof: {what}", total=inputs.num_rows, done=0) as progress:
        for on_cpu in inputs.batches():
            batch, alone = on_cpu.to(inputs.device), None
            if adapter is not None:
                with model.disable_adapter():
                    alone = _logits(model, batch)
            targets = on_cpu.labels[0, on_cpu.predicting + 1]
            yield _Answer(targets, _logits(model, batch), alone)
            progress.advance(1)
    del model
    gc.collect()
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()


def _logits(model: Any, batch: Batch) -> Tensor:
    attention: str = model.config._attn_implementation
    return (
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.predicting,
            use_cache=False,
            **packing_kwargs(attention, batch.cu_seqlens, batch.max_seqlen),
        )
        .logits[0]
        .cpu()
    )


class _Tally:
    """Sums up what a model answers, and how far it is from another."""

    def __init__(self) -> None:
        self.num_positions = self._num_same = 0
        self._loss = self._kl = self._max_kl = self._difference = 0.0

    def add(self, found: Tensor, targets: Tensor, expected: Tensor | None = None) -> None:
        """Count a row: logits (positions, V), the tokens to predict, and the other's logits."""
        loss = nn.functional.cross_entropy(found.float(), targets, reduction="sum")
        self._loss += float(loss)
        self.num_positions += len(targets)
        if expected is None:
            return
        pieces = (expected.split(_POSITIONS_AT_ONCE), found.split(_POSITIONS_AT_ONCE))
        for p, q in zip(*pieces, strict=True):
            kl = divergence(p, q)
            self._kl += float(kl.sum())
            self._max_kl = max(self._max_kl, float(kl.max()))
            self._difference = max(self._difference, float((p.float() - q.float()).abs().max()))
            self._num_same += int((p.argmax(-1) == q.argmax(-1)).sum())

    @property
    def loss(self) -> float:
        """The mean over the positions, in nats."""
        return self._loss / self.num_positions

    @property
    def comparison(self) -> Comparison:
        """The figures of all rows."""
        count = self.num_positions
        return Comparison(self._kl / count, self._max_kl, self._difference, self._num_same / count)


def divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, in nats.

    Args:
        logits_p: (positions, V), any floating type.
        logits_q: the same shape.

    Returns:
        (positions,) fp64, at least 0. In fp64: of two nearly equal distributions fp32 would show
        its own rounding, about 1e-7.
    """
    p, q = logits_p.double().log_softmax(-1), logits_q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
