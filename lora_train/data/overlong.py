"""What happens to examples that are longer than a sequence may be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_train.config import DataConfig
from lora_train.data.examples import Examples
from lora_train.data.tokenizing import Tokenized
from lora_train.errors import UserError

logger = logging.getLogger(__name__)

_REFUSED_FRACTION = 0.05
TRUNCATABLE = ("input_output", "prompt_completion")
"""Forms of rows whose input can be cut."""


@dataclass(frozen=True)
class LengthLimit:
    """The longest example, and where that number comes from."""

    tokens: int
    """Tokens that an example may have, BOS and EOS included."""
    source: str
    """What sets it, for messages: `data.seq_length` or the model's positions."""
    max_positions: int | None
    """Positions of the model, if known; positions start over in each example of a pack."""

    @classmethod
    def of(cls, data: DataConfig, max_positions: int | None) -> LengthLimit:
        """Return the smaller of data.seq_length and the positions of the model."""
        if max_positions is not None and max_positions < data.seq_length:
            return cls(max_positions, "the model's max_position_embeddings", max_positions)
        return cls(data.seq_length, "data.seq_length", max_positions)


@dataclass(frozen=True)
class Fitted:
    """Sequences that fit, and what became of those that did not."""

    kept: list[Tokenized]
    """Sequences within the limit, in order."""
    num_dropped: int
    """Sequences left out."""
    num_truncated: int
    """Sequences whose input was cut; they are among `kept`."""


def fit(
    sequences: Sequence[Tokenized], data: DataConfig, limit: LengthLimit, examples: Examples
) -> Fitted:
    """Apply `data.overlong` to tokenized sequences.

    Args:
        sequences: tokenized sequences, before `train_on` widens what is supervised.
        data: the data section.
        limit: the longest sequence.
        examples: what they were made of; only raw prompts and answers can be truncated, and rows
            held out from training leave it to the training rows whether too many are too long.

    Returns:
        What is left.

    Raises:
        UserError: too many are too long for `auto`, `truncate` is asked of a format that cannot, or
            nothing is left.
    """
    lengths = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)
    too_long = lengths > limit.tokens
    num_too_long = int(too_long.sum())
    if num_too_long == 0:
        return Fitted(list(sequences), 0, 0)
    found = (
        f"{num_too_long} of {len(sequences)} examples of {examples.name} are longer than"
        f" {limit.source}={limit.tokens} tokens; the longest has {lengths.max()},"
        f" 95 % have at most {int(np.quantile(lengths, 0.95))}"
    )
    if data.overlong == "truncate" and examples.format_name not in TRUNCATABLE:
        raise UserError(
            f"data.overlong=truncate cuts the input of {' and '.join(TRUNCATABLE)} rows, and these"
            f" are {examples.format_name}; {found}",
            hint=f"{_longer_hint(lengths, limit)}data.overlong=drop leaves them out",
        )
    too_many = num_too_long > _REFUSED_FRACTION * len(sequences) and not examples.is_held_out
    if data.overlong == "auto" and too_many:
        raise UserError(
            f"{found}; data.overlong=auto leaves out at most {_REFUSED_FRACTION:.0%}",
            hint=f"{_longer_hint(lengths, limit)}data.overlong=drop leaves them out",
        )
    kept = []
    num_truncated = 0
    for sequence, long in zip(sequences, too_long.tolist(), strict=True):
        if not long:
            kept.append(sequence)
        elif data.overlong == "truncate" and (cut := truncated(sequence, limit.tokens)):
            kept.append(cut)
            num_truncated += 1
    num_dropped = len(sequences) - len(kept)
    if not kept:
        raise UserError(
            f"no example is left: {found}", hint=f"{_longer_hint(lengths, limit)}".rstrip("; ")
        )
    logger.warning("%s; left out: %d, input cut: %d", found, num_dropped, num_truncated)
    return Fitted(kept, num_dropped, num_truncated)


def _longer_hint(lengths: np.ndarray, limit: LengthLimit) -> str:
    longest = -(-int(lengths.max()) // 64) * 64
    if limit.max_positions is not None and longest > limit.max_positions:
        return ""
    return f"data.seq_length={longest} takes all; "


def truncated(sequence: Tokenized, limit: int) -> Tokenized | None:
    """Cut the end of the input, as NeMo does; None if the answer leaves no room for any input.

    NeMo would go on and cut the answer, which teaches the model to stop anywhere.
    """
    answer = int(np.argmax(sequence.supervised))
    keep = answer - (len(sequence.tokens) - limit)
    if keep < 1:
        return None
    return Tokenized(
        np.concatenate([sequence.tokens[:keep], sequence.tokens[answer:]]),
        np.concatenate([sequence.supervised[:keep], sequence.supervised[answer:]]),
    )
