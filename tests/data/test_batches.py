"""Micro-batches hold what they say, and the schedule is a pure function of the step."""

import collections

import numpy as np
import pytest
import torch

from lora_train.data.batches import IGNORED_LABEL, BatchSchedule, collate
from lora_train.data.packing import pack_best_fit
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import Tokenized


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return TokenizedSet.of(
        [
            Tokenized(rng.integers(0, 1000, length).astype(np.int32), rng.random(length) < 0.5)
            for length in rng.integers(1, 40, 60)
        ]
    )


def test_a_batch_holds_its_examples_end_to_end(examples):
    packs = pack_best_fit(examples.lengths, 64, seed=0)
    batch = collate(examples, packs, [3, 0])
    members = [*packs[3], *packs[0]]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens.diff().tolist() == [len(examples[i][0]) for i in members]
    assert batch.max_seqlen == max(len(examples[i][0]) for i in members)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.dtype == torch.int64 and tensor.shape == (1, batch.cu_seqlens[-1])
    for place, index in enumerate(members):
        part = slice(batch.cu_seqlens[place], batch.cu_seqlens[place + 1])
        tokens, supervised = examples[index]
        assert batch.input_ids[0, part].tolist() == tokens.tolist()
        assert batch.position_ids[0, part].tolist() == list(range(len(tokens)))
        expected = np.where(supervised, tokens, IGNORED_LABEL)
        expected[0] = IGNORED_LABEL
        assert batch.labels[0, part].tolist() == expected.tolist()


def test_the_shifted_loss_counts_num_supervised_tokens(examples):
    packs = pack_best_fit(examples.lengths, 64, seed=0)
    for pack in range(len(packs)):
        batch = collate(examples, packs, np.array([pack]))
        shifted = batch.labels[0, 1:]
        assert batch.num_supervised == (shifted != IGNORED_LABEL).sum()
        assert torch.equal(batch.predicting, (shifted != IGNORED_LABEL).nonzero()[:, 0])
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels) and moved.max_seqlen == batch.max_seqlen
    with pytest.raises(ValueError, match="at least one pack"):
        collate(examples, packs, [])


@pytest.mark.parametrize(("num_packs", "size"), [(10, 4), (7, 7), (3, 8), (1, 5), (100, 1)])
def test_every_epoch_sees_every_pack_once_in_a_new_order(num_packs, size):
    schedule = BatchSchedule(num_packs, size, seed=3)
    stream = np.concatenate([schedule.pack_ids(step) for step in range(3 * num_packs)])
    epochs = stream[: len(stream) // num_packs * num_packs].reshape(-1, num_packs)
    assert (np.sort(epochs, axis=1) == np.arange(num_packs)).all()
    if num_packs > 3:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_resuming_needs_the_step_number_only():
    one, other = BatchSchedule(10, 4, seed=3), BatchSchedule(10, 4, seed=4)
    forward = [one.pack_ids(step).tolist() for step in range(9)]
    assert [one.pack_ids(step).tolist() for step in reversed(range(9))] == forward[::-1]
    assert forward != [other.pack_ids(step).tolist() for step in range(9)]
    # the batch size cuts the same stream otherwise
    wide = BatchSchedule(10, 8, seed=3)
    assert wide.pack_ids(1).tolist() == forward[2] + forward[3]


def test_epochs_and_steps():
    schedule = BatchSchedule(10, 4, seed=0)
    assert schedule.epoch(0) == 0 and schedule.epoch(5) == 2.0
    assert [schedule.num_steps(e) for e in (0.01, 0.4, 1.0, 2.0, 2.1)] == [1, 1, 3, 5, 6]
    assert BatchSchedule(30, 1, seed=0).num_steps(0.1) == 3
    counts = collections.Counter(
        np.concatenate([schedule.pack_ids(step) for step in range(5)]).tolist()
    )
    assert set(counts.values()) == {2}
    with pytest.raises(ValueError, match="must be at least 1"):
        BatchSchedule(0, 4, seed=0)
