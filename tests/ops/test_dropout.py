import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.dropout import Dropout, keep_mask, keep_mask_reference


@triton.jit
def _write_mask(out_ptr, num_rows, num_columns, seed, stream, threshold, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = keep_mask(seed, stream, threshold, rows[:, None], columns[None, :])
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], keep.to(tl.int8), inside)


@pytest.mark.parametrize("dropout", [Dropout(0.1, 2**31 - 1, 7), Dropout(0.5, 1, 0)])
def test_kernels_and_reference_drop_the_same(device: str, dropout: Dropout) -> None:
    out = torch.empty(70, 133, dtype=torch.int8, device=device)
    grid = (triton.cdiv(70, 32), triton.cdiv(133, 32))
    _write_mask[grid](out, 70, 133, dropout.seed, dropout.stream, dropout.threshold, BLOCK=32)
    assert torch.equal(out.bool(), keep_mask_reference(dropout, 70, 133, device))


def test_share_dropped_is_p() -> None:
    keep = keep_mask_reference(Dropout(0.1, 5, 3), 1000, 1000)
    assert abs(keep.float().mean().item() - 0.9) < 0.002
    # neither rows nor columns repeat each other
    assert keep.float().mean(0).std() < 0.02
    assert keep.float().mean(1).std() < 0.02
    assert (keep[:-1] == keep[1:]).float().mean() < 0.83
    assert (keep[:, :-1] == keep[:, 1:]).float().mean() < 0.83


def test_streams_and_seeds_differ() -> None:
    masks = [
        keep_mask_reference(Dropout(0.5, seed, stream), 64, 64)
        for seed in (1, 2)
        for stream in (0, 1)
    ]
    for index, one in enumerate(masks):
        for other in masks[index + 1 :]:
            assert 0.4 < (one == other).float().mean() < 0.6
