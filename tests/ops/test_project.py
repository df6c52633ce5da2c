import functools
from typing import Any

import pytest
import torch
from truth import assert_close_to_truth, poisoned, strided

from lora_kernels import launch, project
from lora_kernels.dropout import Dropout, apply_dropout_reference
from lora_kernels.project import add_masked_product, dropped
from lora_kernels.reference import reference_add_masked_product, reference_project

DROPOUT = Dropout(0.3, 12345, 3)
# rows that start anywhere, odd widths, less than a tile and several
SIZES = [(0, 64), (1, 123), (17, 507), (40, 123), (64, 128)]


@pytest.fixture(params=["mm", "kernel"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to make H."""
    tables = launch.launch_config

    def launch_config(kernel: str, device: torch.device, width: int) -> dict[str, Any]:
        config = tables(kernel, device, width)
        if "PRODUCT" in config:
            config["PRODUCT"] = request.param
        if kernel == "dropped":
            # each program takes the interpreter long
            config["BLOCK_M"] = 16
        return config

    monkeypatch.setattr(launch, "launch_config", launch_config)
    # the interpreter's dtypes are the wide ones, which take "mm" otherwise
    monkeypatch.setattr(project, "_BYTES_IN_KERNEL", 8)
    return request.param


# rows that begin anywhere
_unaligned = functools.partial(strided, left=5)


def _check_project(
    num_rows: int,
    num_columns: int,
    rank_columns: int,
    dtype: torch.dtype,
    device: str,
    *,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
    in_place: bool = False,
) -> None:
    x = _unaligned(num_rows, num_columns, dtype=dtype, device=device)
    a = _unaligned(rank_columns, num_columns, dtype=dtype, device=device) * num_columns**-0.5
    a[-10:] = 0

    def reference(as_dtype: torch.dtype) -> torch.Tensor:
        return reference_project(x.to(as_dtype), a.to(as_dtype), dropout, ones_column)

    same, truth = reference(dtype), reference(torch.float64)
    results = []
    for _ in range(2):
        wide = poisoned(num_rows, num_columns + rank_columns + 8, dtype=dtype, device=device)
        out = wide[:, : num_columns + rank_columns]
        read = x.clone()
        if in_place:
            read = out[:, :num_columns]
            read.copy_(x)
        project.project(read, a, out, dropout=dropout, ones_column=ones_column)
        assert torch.equal(read, x)
        assert wide[:, num_columns + rank_columns :].isnan().all()
        results.append(out)
    out = results[0]
    assert torch.equal(out, results[1])
    assert torch.equal(out[:, :num_columns], x)
    h = slice(num_columns, None)
    assert_close_to_truth(out[:, h], same[:, h], truth[:, h], "H")
    if ones_column is not None:
        assert (out[:, num_columns + ones_column] == 1).all()


@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_project_of_any_size(
    product: str,
    dtype: torch.dtype,
    device: str,
    num_rows: int,
    num_columns: int,
    in_place: bool,
    dropout: Dropout | None,
) -> None:
    _check_project(num_rows, num_columns, 64, dtype, device, dropout=dropout, in_place=in_place)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize(
    ("rank_columns", "ones_column"), [(64, 0), (64, 63), (128, 60), (192, 191)]
)
def test_project_of_any_rank(
    product: str,
    dtype: torch.dtype,
    device: str,
    rank_columns: int,
    ones_column: int,
    dropout: Dropout | None,
) -> None:
    _check_project(17, 123, rank_columns, dtype, device, dropout=dropout, ones_column=ones_column)


def _check_add(num_rows: int, num_columns: int, rank: int, dtype: torch.dtype, device: str) -> None:
    dx = _unaligned(num_rows, num_columns, dtype=dtype, device=device)
    g = _unaligned(num_rows, rank, dtype=dtype, device=device)
    a = _unaligned(rank, num_columns, dtype=dtype, device=device) * max(1, rank) ** -0.5
    same = reference_add_masked_product(dx, g, a, DROPOUT)
    truth = reference_add_masked_product(dx.double(), g.double(), a.double(), DROPOUT)
    results = []
    for _ in range(2):
        wide = poisoned(num_rows, num_columns + 8, dtype=dtype, device=device)
        actual = wide[:, :num_columns]
        actual.copy_(dx)
        add_masked_product(actual, g, a, DROPOUT)
        assert wide[:, num_columns:].isnan().all()
        results.append(actual)
    assert torch.equal(*results)
    assert_close_to_truth(results[0], same, truth, "dx")
    # what is dropped has no gradient
    kept = apply_dropout_reference(torch.ones_like(dx), DROPOUT) != 0
    assert torch.equal(results[0][~kept], dx[~kept])


@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_add_masked_product_of_any_size(
    dtype: torch.dtype, device: str, num_rows: int, num_columns: int
) -> None:
    _check_add(num_rows, num_columns, 16, dtype, device)


@pytest.mark.parametrize("rank", [0, 8, 48, 64, 80, 192])
def test_add_masked_product_of_any_rank(dtype: torch.dtype, device: str, rank: int) -> None:
    _check_add(17, 123, rank, dtype, device)


@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_dropped(
    dtype: torch.dtype, device: str, num_rows: int, num_columns: int, in_place: bool
) -> None:
    x = _unaligned(num_rows, num_columns, dtype=dtype, device=device)
    same = apply_dropout_reference(x, DROPOUT)
    truth = apply_dropout_reference(x.double(), DROPOUT)
    wide = poisoned(num_rows, num_columns + 8, dtype=dtype, device=device)
    out = wide[:, :num_columns]
    read = x
    if in_place:
        out.copy_(x)
        read = out
    dropped(read, DROPOUT, out)
    assert wide[:, num_columns:].isnan().all()
    assert_close_to_truth(out, same, truth, "drop(x)")
    assert torch.equal(out != 0, same != 0)


def test_they_are_the_gradient_of_project(product: str, device: str) -> None:
    """Autograd through the reference's forward in fp64."""
    num_rows, num_columns, rank_columns, dtype = 17, 123, 64, torch.float64
    x = torch.randn(num_rows, num_columns, dtype=dtype, device=device, requires_grad=True)
    a = torch.randn(rank_columns, num_columns, dtype=dtype, device=device, requires_grad=True)
    dx = torch.randn(num_rows, num_columns, dtype=dtype, device=device)
    g = torch.randn(num_rows, rank_columns, dtype=dtype, device=device)
    out = poisoned(num_rows, num_columns + rank_columns, dtype=dtype, device=device)
    project.project(x.detach(), a.detach(), out, dropout=DROPOUT)
    expected_out = reference_project(x, a, DROPOUT)
    torch.testing.assert_close(out, expected_out.detach(), rtol=1e-12, atol=1e-12)
    expected_dx, expected_da = torch.autograd.grad(expected_out, (x, a), torch.cat([dx, g], 1))
    seen = poisoned(num_rows, num_columns, dtype=dtype, device=device)
    dropped(x.detach(), DROPOUT, seen)
    torch.testing.assert_close(g.T @ seen, expected_da, rtol=1e-12, atol=1e-12)
    add_masked_product(dx, g, a.detach(), DROPOUT)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_refused(device: str) -> None:
    x = torch.zeros(4, 32, device=device)
    a = torch.zeros(64, 32, device=device)
    out = torch.zeros(4, 96, device=device)
    with pytest.raises(ValueError, match="x_MK: rows must be contiguous"):
        project.project(x.T.contiguous().T, a, out)
    with pytest.raises(ValueError, match="a_PK: expected"):
        project.project(x, a[:, :31], out)
    with pytest.raises(ValueError, match="out_aug: expected"):
        project.project(x, a, out[:, :95])
    with pytest.raises(ValueError, match="out_aug: expected"):
        project.project(x, a, out.double())
    for column in (-1, 64):
        with pytest.raises(ValueError, match="ones_column"):
            project.project(x, a, out, ones_column=column)
    with pytest.raises(ValueError, match="dx_MK: rows must be contiguous"):
        add_masked_product(x.T.contiguous().T, x[:, :16], a[:16], DROPOUT)
    with pytest.raises(ValueError, match="g_MR: expected"):
        add_masked_product(x, x[:, :15], a[:16], DROPOUT)
    with pytest.raises(ValueError, match="a_RK: expected"):
        add_masked_product(x, x[:, :16], a[:16, :31], DROPOUT)
    with pytest.raises(ValueError, match="x_MK: rows must be contiguous"):
        dropped(x.T.contiguous().T, DROPOUT, x)
    with pytest.raises(ValueError, match="out: expected"):
        dropped(x, DROPOUT, out)
