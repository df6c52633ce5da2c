from collections.abc import Callable

import pytest
import torch
from truth import assert_close_to_truth, poisoned

from lora_kernels.dropout import Dropout
from lora_kernels.reference import (
    reference_swiglu_backward,
    reference_swiglu_forward,
)
from lora_kernels.swiglu import swiglu_backward, swiglu_forward

DROPOUT = Dropout(0.1, 12345, 6)
# no masks are needed at 64 x 128; rows that start anywhere, odd widths, less than a block
SIZES = [(0, 64), (1, 123), (17, 507), (40, 123), (64, 128)]
SLOTS = [
    ((0, 16), (16, 16), 64),
    ((0, 32), (32, 16), 64),
    ((16, 48), (0, 16), 64),
    ((0, 0), (0, 16), 64),
    ((0, 16), (0, 0), 64),
    ((0, 0), (0, 0), 64),
    ((0, 64), (64, 64), 128),
    ((0, 128), (128, 128), 256),
    ((16, 80), (0, 16), 128),
    ((0, 0), (0, 80), 128),
]


@pytest.fixture
def strided(device: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Random matrices that are views of wider ones, as those of the augmented buffers are."""

    def make(num_rows: int, num_columns: int, scale: float = 1.0) -> torch.Tensor:
        wide = torch.randn(num_rows, num_columns + 32, dtype=dtype, device=device) * scale
        return wide[:, 16 : 16 + num_columns]

    return make


def _poisoned_strided(num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    wide = poisoned(num_rows, num_columns + 32, dtype=like.dtype, device=str(like.device))
    return wide[:, :num_columns]


def _rest_is_untouched(out: torch.Tensor) -> bool:
    assert out._base is not None
    return bool(out._base[:, out.shape[1] :].isnan().all())


def _check_forward(
    gate_up: torch.Tensor,
    a: torch.Tensor | None,
    rank: int,
    rank_columns: int,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> None:
    num_columns = gate_up.shape[1] // 2
    out = _poisoned_strided(gate_up.shape[0], num_columns + rank_columns, gate_up)
    again = out.clone()
    swiglu_forward(gate_up, out, a, rank=rank, dropout=dropout, ones_column=ones_column)
    swiglu_forward(gate_up, again, a, rank=rank, dropout=dropout, ones_column=ones_column)
    assert torch.equal(out, again)
    assert _rest_is_untouched(out)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        return reference_swiglu_forward(
            gate_up.to(dtype),
            None if a is None else a.to(dtype),
            rank=rank,
            rank_columns=rank_columns,
            dropout=dropout,
            ones_column=ones_column,
        )

    same_dtype, truth = reference(gate_up.dtype), reference(torch.float64)
    for name, part in (
        ("act", slice(num_columns)),
        ("H", slice(num_columns, num_columns + rank)),
    ):
        assert_close_to_truth(out[:, part], same_dtype[:, part], truth[:, part], name)
    padding = slice(num_columns + rank, None)
    assert torch.equal(out[:, padding], same_dtype[:, padding])


def _check_backward(
    gate_up: torch.Tensor,
    dact: torch.Tensor,
    sb: torch.Tensor | None,
    gate_slot: tuple[int, int],
    up_slot: tuple[int, int],
    rank_columns: int,
    adapter: tuple[torch.Tensor, torch.Tensor, Dropout] | None = None,
    act_out: str = "own",
) -> None:
    num_rows, num_columns = dact.shape
    slots = {"gate_slot": gate_slot, "up_slot": up_slot}

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return reference_swiglu_backward(
            gate_up.to(dtype),
            dact.to(dtype),
            None if sb is None else sb.to(dtype),
            **slots,
            rank_columns=rank_columns,
            adapter=adapter and (adapter[0].to(dtype), adapter[1].to(dtype), adapter[2]),
        )

    (same_out, same_act), (true_out, true_act) = reference(dact.dtype), reference(torch.float64)
    results = []
    for _ in range(2):
        out = _poisoned_strided(num_rows, 2 * num_columns + rank_columns, dact)
        read = dact.clone()
        act = None
        if act_out == "dact":
            act = read
        elif act_out == "own":
            act = _poisoned_strided(num_rows, num_columns, dact)
        swiglu_backward(gate_up, read, out, sb, **slots, act_out=act, adapter=adapter)
        assert _rest_is_untouched(out)
        if act_out != "dact":
            assert torch.equal(read, dact)
        results.append((out, act))
    (out, act), (out_again, act_again) = results
    assert torch.equal(out, out_again)

    is_padding = torch.ones(rank_columns, dtype=torch.bool)
    parts = {"dgate": slice(num_columns), "dup": slice(num_columns, 2 * num_columns)}
    for name, (first, width) in slots.items():
        start = 2 * num_columns + first
        parts[name] = slice(start, start + width)
        is_padding[first : first + width] = False
    for name, part in parts.items():
        assert_close_to_truth(out[:, part], same_out[:, part], true_out[:, part], name)
    assert (out[:, 2 * num_columns :][:, is_padding] == 0).all()
    if act is not None:
        assert_close_to_truth(act, same_act, true_act, "act")
        assert torch.equal(act, act_again)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_forward_of_any_size(
    strided: Callable[..., torch.Tensor], num_rows: int, num_columns: int, dropout: Dropout | None
) -> None:
    gate_up = strided(num_rows, 2 * num_columns)
    a = strided(64, num_columns, num_columns**-0.5)
    _check_forward(gate_up, a, 16, 64, dropout, ones_column=16)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize(
    ("rank", "rank_columns", "ones_column"),
    [
        (0, 64, 0), (0, 64, None), (32, 64, None), (48, 64, 63), (64, 64, None),
        (80, 128, 81), (128, 128, None), (256, 320, None),
    ],
)  # fmt: skip
def test_forward_of_any_rank(
    strided: Callable[..., torch.Tensor],
    rank: int,
    rank_columns: int,
    ones_column: int | None,
    dropout: Dropout | None,
) -> None:
    a = strided(rank_columns, 123, 123**-0.5)
    _check_forward(strided(17, 246), a, rank, rank_columns, dropout, ones_column)


def test_forward_without_adapter(strided: Callable[..., torch.Tensor]) -> None:
    _check_forward(strided(17, 246), None, 0, 0)
    # a bias alone
    _check_forward(strided(17, 246), None, 0, 64, ones_column=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates(device: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], dtype=dtype, device=device)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None, :].clone()
    out = poisoned(1, 7, dtype=dtype, device=device)
    swiglu_forward(gate_up, out, None, rank=0)
    truth = reference_swiglu_forward(gate_up.double(), None, rank=0, rank_columns=0)
    torch.testing.assert_close(out.double(), truth, rtol=2e-6 + torch.finfo(dtype).eps, atol=1e-7)
    grads = poisoned(1, 14, dtype=dtype, device=device)
    swiglu_backward(
        gate_up, torch.ones_like(out), grads, None, gate_slot=(0, 0), up_slot=(0, 0), act_out=None
    )
    truth, _ = reference_swiglu_backward(
        gate_up.double(), torch.ones_like(truth), None,
        gate_slot=(0, 0), up_slot=(0, 0), rank_columns=0,
    )  # fmt: skip
    torch.testing.assert_close(grads.double(), truth, rtol=2e-6 + torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_backward_of_any_size(
    strided: Callable[..., torch.Tensor], num_rows: int, num_columns: int, dropped: bool
) -> None:
    adapter = None
    if dropped:
        adapter = (strided(num_rows, 16), strided(16, num_columns), DROPOUT)
    _check_backward(
        strided(num_rows, 2 * num_columns),
        strided(num_rows, num_columns),
        strided(2 * num_columns, 64, num_columns**-0.5),
        (0, 16), (16, 16), 64, adapter,
    )  # fmt: skip


@pytest.mark.parametrize(("gate_slot", "up_slot", "rank_columns"), SLOTS)
def test_backward_of_any_slots(
    strided: Callable[..., torch.Tensor],
    gate_slot: tuple[int, int],
    up_slot: tuple[int, int],
    rank_columns: int,
) -> None:
    sb = strided(246, rank_columns, 123**-0.5)
    _check_backward(strided(17, 246), strided(17, 123), sb, gate_slot, up_slot, rank_columns)


@pytest.mark.parametrize("adapter_rank", [16, 48, 64, 128])
@pytest.mark.parametrize("slots", [SLOTS[0], SLOTS[7], ((0, 0), (0, 0), 0)])
def test_backward_with_dropout(
    strided: Callable[..., torch.Tensor],
    slots: tuple[tuple[int, int], tuple[int, int], int],
    adapter_rank: int,
) -> None:
    gate_slot, up_slot, rank_columns = slots
    sb = strided(246, rank_columns, 123**-0.5) if rank_columns else None
    adapter = (
        strided(17, adapter_rank), strided(adapter_rank, 123, adapter_rank**-0.5), DROPOUT
    )  # fmt: skip
    _check_backward(
        strided(17, 246), strided(17, 123), sb, gate_slot, up_slot, rank_columns, adapter
    )


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("act_out", ["dact", "none"])
@pytest.mark.parametrize("slots", [SLOTS[0], SLOTS[7], ((0, 0), (0, 0), 0)])
def test_act_in_place_of_its_gradient(
    strided: Callable[..., torch.Tensor],
    slots: tuple[tuple[int, int], tuple[int, int], int],
    act_out: str,
    dropped: bool,
) -> None:
    gate_slot, up_slot, rank_columns = slots
    sb = strided(246, rank_columns, 123**-0.5) if rank_columns else None
    adapter = (strided(40, 32), strided(32, 123, 0.2), DROPOUT) if dropped else None
    _check_backward(
        strided(40, 246), strided(40, 123), sb, gate_slot, up_slot, rank_columns, adapter, act_out
    )


def test_backward_is_the_gradient_of_forward(device: str) -> None:
    gate_up = torch.randn(17, 246, dtype=torch.float64, device=device, requires_grad=True)
    dact = torch.randn(17, 123, dtype=torch.float64, device=device)
    act = reference_swiglu_forward(gate_up, None, rank=0, rank_columns=0)
    act.backward(dact)
    out, _ = reference_swiglu_backward(
        gate_up.detach(), dact, None, gate_slot=(0, 0), up_slot=(0, 0), rank_columns=0
    )
    torch.testing.assert_close(out, gate_up.grad)


def test_wrong_arguments_are_refused(device: str) -> None:
    gate_up = torch.zeros(4, 64, device=device)
    a = torch.zeros(64, 32, device=device)
    out = torch.zeros(4, 96, device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        swiglu_forward(gate_up, out, a, rank=8)
    with pytest.raises(ValueError, match="within 64"):
        swiglu_forward(gate_up, out, a, rank=80)
    with pytest.raises(ValueError, match="no adapter"):
        swiglu_forward(gate_up, out, None, rank=16)
    with pytest.raises(ValueError, match="ones_column"):
        swiglu_forward(gate_up, out, a, rank=16, ones_column=15)
    with pytest.raises(ValueError, match="contiguous"):
        swiglu_forward(gate_up.T.contiguous().T, out, a, rank=16)
    with pytest.raises(ValueError, match="float64"):
        swiglu_forward(gate_up, out, a.double(), rank=16)
    out = torch.zeros(4, 128, device=device)
    sb = torch.zeros(64, 64, device=device)
    dact = torch.zeros(4, 32, device=device)
    with pytest.raises(ValueError, match="overlap"):
        swiglu_backward(
            gate_up, dact, out, sb, gate_slot=(0, 32), up_slot=(16, 16), act_out=None
        )  # fmt: skip
    with pytest.raises(ValueError, match="no adapter"):
        swiglu_backward(
            gate_up, dact, out, None, gate_slot=(0, 16), up_slot=(0, 0), act_out=None
        )  # fmt: skip
