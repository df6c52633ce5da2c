"""Micro-batches without padding, and which packs each optimizer step sees."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from lora_train.data.packing import Packs
    from lora_train.data.prepared import TokenizedSet

IGNORED_LABEL = -100
"""Label of a token that does not count in the loss; the value torch's cross entropy skips."""


@dataclass(frozen=True)
class Batch:
    """Examples of one micro-batch, laid end to end in a single row of T tokens."""

    input_ids: torch.Tensor
    """Token ids, (1, T) int64."""
    labels: torch.Tensor
    """The ids that count in the loss, else -100; (1, T) int64, aligned with input_ids."""
    position_ids: torch.Tensor
    """Positions, starting over at 0 in each example; (1, T) int64."""
    predicting: torch.Tensor
    """Places whose next token counts in the loss, (num_supervised,) int64; these need logits."""
    cu_seqlens: torch.Tensor
    """Starts of the examples and the end of the last, (number of examples + 1,) int32."""
    max_seqlen: int
    """Tokens of the longest example."""
    num_supervised: int
    """Tokens that are predicted and count in the loss: labels that are not -100."""

    @property
    def attended_keys(self) -> int:
        """Over all tokens, the keys that each attends to: those before it, and itself."""
        return int(self.position_ids.sum()) + self.position_ids.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


def collate(examples: TokenizedSet, packs: Packs, pack_ids: Sequence[int] | np.ndarray) -> Batch:
    """Lay the examples of some packs end to end.

    The first token of each example has label -100: nothing before it may predict it. So the
    shifted loss counts exactly `num_supervised` tokens, and none crosses from example to example.

    Args:
        examples: the tokenized examples.
        packs: which examples each pack holds.
        pack_ids: the packs of this micro-batch, in this order.

    Returns:
        One row of all their tokens.

    Raises:
        ValueError: `pack_ids` is empty.
    """
    if len(pack_ids) == 0:
        raise ValueError("a micro-batch needs at least one pack")
    members = [examples[index] for pack in pack_ids for index in packs[int(pack)]]
    lengths = np.array([len(tokens) for tokens, _ in members], dtype=np.int64)
    cu_seqlens = np.zeros(len(members) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])

    input_ids = np.concatenate([tokens for tokens, _ in members]).astype(np.int64)
    supervised = np.concatenate([marks for _, marks in members])
    labels = np.where(supervised, input_ids, IGNORED_LABEL)
    labels[cu_seqlens[:-1]] = IGNORED_LABEL
    position_ids = np.arange(len(input_ids), dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        predicting=torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED_LABEL)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        num_supervised=int((labels != IGNORED_LABEL).sum()),
    )


@dataclass(frozen=True)
class BatchSchedule:
    """Which packs each optimizer step sees: a pure function of the step.

    The packs are shuffled anew for each epoch, and the shuffled epochs follow each other without a
    gap. Step s sees places [s * global_batch_size, (s + 1) * global_batch_size) of that endless
    sequence. So a run resumes from the step number alone, whatever the number of processes.
    """

    num_packs: int
    """Packs of the training set, at least 1."""
    global_batch_size: int
    """Packs per optimizer step, over all devices."""
    seed: int
    """Seed of the shuffles."""

    def __post_init__(self) -> None:
        if self.num_packs < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"num_packs ({self.num_packs}) and global_batch_size ({self.global_batch_size})"
                " must be at least 1"
            )

    def pack_ids(self, step: int) -> np.ndarray:
        """Return the packs of one optimizer step.

        Args:
            step: optimizer step, counted from 0.

        Returns:
            Pack indexes, (global_batch_size,) int64, the same in every process.
        """
        places = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, within = np.divmod(places, self.num_packs)
        return np.concatenate(
            [
                _permutation(self.num_packs, self.seed, int(epoch))[within[epochs == epoch]]
                for epoch in np.unique(epochs)
            ]
        )

    def epoch(self, step: int) -> float:
        """Return the passes over the training set done before this step, such as 1.25."""
        return step * self.global_batch_size / self.num_packs

    def num_steps(self, epochs: float) -> int:
        """Return the optimizer steps of so many passes, rounded up to whole steps, at least 1."""
        # the rounding keeps 0.1 * 30 / 1 from being 4 steps
        return max(1, math.ceil(round(epochs * self.num_packs / self.global_batch_size, 9)))


@functools.lru_cache(maxsize=4)
def _permutation(num_packs: int, seed: int, epoch: int) -> np.ndarray:
    permutation = np.random.default_rng((seed, epoch)).permutation(num_packs)
    permutation.setflags(write=False)
    return permutation
