"""Packs: every example once, nothing over the length, full, and the same for the same seed."""

import itertools

import numpy as np
import pytest

from lora_train.data.packing import fill_rate, one_per_pack, pack_best_fit


def check(packs, lengths, capacity):
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert packs.offsets[0] == 0 and packs.offsets[-1] == len(lengths)
    assert (np.diff(packs.offsets) > 0).all(), "an empty pack"
    sums = np.add.reduceat(lengths[packs.members], packs.offsets[:-1])
    assert sums.max() <= capacity
    assert [packs[i].tolist() for i in range(len(packs))] == [
        packs.members[a:b].tolist() for a, b in itertools.pairwise(packs.offsets)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [8, 100, 2048])
def test_invariants(capacity, seed):
    rng = np.random.default_rng(seed)
    for number in (1, 2, 17, 1000):
        lengths = rng.integers(1, capacity + 1, number)
        check(pack_best_fit(lengths, capacity, seed), lengths, capacity)


def test_best_fit_decreasing_against_a_plain_version():
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 65, 300)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 64) - length)
    packs = pack_best_fit(lengths, 64, seed=0)
    left = 64 - np.add.reduceat(lengths[packs.members], packs.offsets[:-1])
    assert sorted(left.tolist()) == sorted(rooms)


def test_the_seed_decides_and_nothing_else():
    lengths = np.random.default_rng(0).integers(20, 60, 500)
    one, same, other = (pack_best_fit(lengths, 256, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.members, same.members) and np.array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.members, other.members)


def test_packs_are_full_on_lengths_as_in_squad():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(8, 25, 83_000).astype(int), 30, 900)
    packs = pack_best_fit(lengths, 2048, seed=1234)
    check(packs, lengths, 2048)
    assert fill_rate(packs, lengths, 2048) >= 0.98


def test_edges():
    assert len(pack_best_fit(np.array([], dtype=int), 8, 0)) == 0
    assert len(pack_best_fit(np.full(5, 8), 8, 0)) == 5
    with pytest.raises(ValueError, match=r"must lie in 1\.\.8: 3\.\.9"):
        pack_best_fit(np.array([3, 9]), 8, 0)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        pack_best_fit(np.array([3, 0]), 8, 0)
    packs = one_per_pack(3)
    assert [packs[i].tolist() for i in range(3)] == [[0], [1], [2]]
    with pytest.raises(IndexError):
        packs[3]
