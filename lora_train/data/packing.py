"""Best-fit packing: examples into sequences of a fixed length, with hardly a token to spare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Which examples share a sequence, as two flat arrays."""

    members: np.ndarray
    """Indexes of examples, pack after pack, (number of examples,) int64."""
    offsets: np.ndarray
    """Where each pack starts in `members`, and the last ends, (number of packs + 1,) int64."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.members[self.offsets[pack] : self.offsets[pack + 1]]


def pack_best_fit(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Pack by best-fit decreasing: the longest first, each where the least room would be left.

    Examples of the same length change places with the seed, nothing else does: the same seed gives
    the same packs.

    Args:
        lengths: tokens of each example, (number of examples,) integers in 1..capacity.
        capacity: tokens that a pack holds.
        seed: seed of the order among examples of one length.

    Returns:
        The packs; every example is in exactly one.

    Raises:
        ValueError: an example is empty or longer than a pack.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}: {lengths.min()}..{lengths.max()}")
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]

    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # bit r is set when some pack has exactly r tokens of room: the tightest fit is the lowest set
    # bit from `length` up. 100,000 examples take 0.06 s for 2,048 tokens, 0.5 s for 131,072
    rooms = 0
    for index, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room = capacity
            pack = len(packs)
            packs.append([])
        packs[pack].append(index)
        left = room - length
        with_room[left].append(pack)
        rooms |= 1 << left

    sizes = [len(pack) for pack in packs]
    return Packs(
        members=np.array([index for pack in packs for index in pack], dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def one_per_pack(num_examples: int) -> Packs:
    """Return packs of a single example each, in their order."""
    return Packs(
        members=np.arange(num_examples, dtype=np.int64),
        offsets=np.arange(num_examples + 1, dtype=np.int64),
    )


def fill_rate(packs: Packs, lengths: np.ndarray, capacity: int) -> float:
    """Return the share of the packs' room that tokens take, 0..1."""
    room = len(packs) * capacity
    return float(np.sum(lengths)) / room if room else 0.0
