"""Tokenized examples as flat arrays, and what is reported about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_train.data.packing import Packs
from lora_train.data.tokenizing import Tokenized

if TYPE_CHECKING:
    from lora_train.data.sources import Sources


@dataclass(frozen=True)
class TokenizedSet:
    """Tokenized examples, end to end; memory-mapped when they come from the cache."""

    tokens: np.ndarray
    """Token ids of all examples, (number of tokens,) int32."""
    supervised: np.ndarray
    """Whether each token is to be learned, (number of tokens,) bool."""
    offsets: np.ndarray
    """Where each example starts, and the end of the last, (number of examples + 1,) int64."""

    @classmethod
    def of(cls, sequences: Sequence[Tokenized]) -> TokenizedSet:
        """Lay sequences end to end."""
        lengths = [len(sequence.tokens) for sequence in sequences]
        return cls(
            tokens=np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int32),
            supervised=np.concatenate([sequence.supervised for sequence in sequences]).astype(bool),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.supervised[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (number of examples,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class SetReport:
    """Counts of one set."""

    source: str
    """The file, folder or hub dataset."""
    num_rows: int
    """Rows read."""
    num_examples: int
    """Training sequences they became, without those left out."""
    num_dropped: int
    """Sequences left out for their length."""
    num_truncated: int
    """Sequences whose input was cut for their length."""
    num_tokens: int
    """Tokens of all examples."""
    num_supervised: int
    """Tokens that count in the loss."""
    longest: int
    """Tokens of the longest example."""
    num_packs: int
    """Sequences that the examples are packed into."""
    fill_rate: float
    """Share of the packs' room that tokens take, 0..1."""


@dataclass(frozen=True)
class DataReport:
    """What was read and what became of it."""

    format: str
    """Form of the rows: one of the values of `data.format`, without `auto`."""
    seq_length: int
    """Room of a pack, in tokens."""
    train: SetReport
    """The training set."""
    validation: SetReport | None
    """The validation set, if any."""
    notes: tuple[str, ...] = ()
    """What a reader should know about how the texts were made."""

    def text(self) -> str:
        """Return the report as a few lines for people."""
        lines = [f"data: {self.format} rows, packs of {self.seq_length} tokens"]
        for name, one in (("train", self.train), ("validation", self.validation)):
            if one is None:
                lines.append(f"  {name}: none")
                continue
            share = one.num_supervised / one.num_tokens
            dropped = f", {one.num_dropped} left out as too long" if one.num_dropped else ""
            cut = f", {one.num_truncated} with their input cut" if one.num_truncated else ""
            lines.append(
                f"  {name}: {one.num_examples:,} examples{dropped}{cut}; {one.num_tokens:,} tokens,"
                f" {share:.1%} of them learned; {one.num_packs:,} packs, {one.fill_rate:.1%} full;"
                f" from {one.source}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class PreparedData:
    """Everything the trainer reads: tokenized and packed."""

    train: TokenizedSet
    """Training examples."""
    train_packs: Packs
    """How they are packed."""
    validation: TokenizedSet | None
    """Validation examples, if any."""
    validation_packs: Packs | None
    """How they are packed."""
    report: DataReport
    """Counts and notes."""
    content_hash: str
    """Hash of all that determines the above; equal hashes mean equal batches."""
    sources: Sources | None = None
    """Where the rows came from; None for what the cache holds, before it is given to a run."""
