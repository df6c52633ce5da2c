import pytest
import torch
from truth import assert_close_to_truth, poisoned

from lora_kernels import launch, rms_norm
from lora_kernels.dropout import Dropout, apply_dropout_reference
from lora_kernels.reference import (
    reference_add_rms_norm_forward,
    reference_rms_norm_backward,
)
from lora_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward

EPS = 1e-5
DROPOUT = Dropout(0.3, 12345, 3)
PRODUCTS = ("mm", "kernel")


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to make H and G pass every test; tiles that do not cover K in one step."""
    _choose(monkeypatch, request.param)
    return request.param


def _choose(monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    tables = launch.launch_config

    def launch_config(kernel: str, device: torch.device, width: int) -> dict[str, object]:
        config = tables(kernel, device, width)
        if "PRODUCT" in config:
            config["PRODUCT"] = product
        if kernel.endswith("_tiles"):
            config |= {"BLOCK_M": 16, "BLOCK_K": 32}
        return config

    monkeypatch.setattr(launch, "launch_config", launch_config)
    # the interpreter's dtypes are the wide ones, which take "mm" otherwise
    monkeypatch.setattr(rms_norm, "_BYTES_IN_KERNEL", 8)


def _strided(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random numbers in a view whose rows are longer than they look."""
    wide = poisoned(shape[0], shape[1] + 13, dtype=dtype, device=device)
    view = wide[:, 5 : 5 + shape[1]]
    view.copy_(torch.randn(shape, device=device))
    return view


def _outputs(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return poisoned(shape[0], shape[1] + 8, dtype=dtype, device=device)[:, : shape[1]]


def _rstd_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _double(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def _assert_close(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, name: str
) -> None:
    if actual.dtype != torch.float64:
        assert_close_to_truth(actual, same_dtype, truth, name)
        return
    # here the truth is as rounded as the kernel: the three-way bound would allow one rounding only
    largest = truth.abs().max().item() if truth.numel() else 0.0
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-13 * (largest + 1))


def _check_forward(
    M: int,
    K: int,
    P: int,
    dtype: torch.dtype,
    device: str,
    *,
    with_delta: bool = True,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
    eps: float = EPS,
    scale: float = 1.0,
) -> None:
    residual = _strided(M, K, dtype=dtype, device=device) * scale
    delta = _strided(M, K, dtype=dtype, device=device) * scale if with_delta else None
    weight = torch.randn(K, device=device).to(dtype)
    a = None
    if P:
        a = _strided(P, K, dtype=dtype, device=device)
        a[P - 10 :] = 0
    out = _outputs(M, K + P, dtype=dtype, device=device)
    residual_out = _outputs(M, K, dtype=dtype, device=device) if with_delta else None
    rstd = poisoned(M, dtype=_rstd_dtype(dtype), device=device)
    add_rms_norm_forward(
        residual, delta, weight, eps, out, a, residual_out, rstd,
        dropout=dropout, ones_column=ones_column,
    )  # fmt: skip

    same = reference_add_rms_norm_forward(residual, delta, weight, eps, a, dropout, ones_column)
    residual64, delta64, weight64, a64 = _double(residual, delta, weight, a)
    truth = reference_add_rms_norm_forward(
        residual64, delta64, weight64, eps, a64, dropout, ones_column
    )
    _assert_close(out[:, :K], same[0][:, :K], truth[0][:, :K], "x")
    _assert_close(out[:, K:], same[0][:, K:], truth[0][:, K:], "H")
    if residual_out is not None:
        assert torch.equal(residual_out, residual + delta)
    _assert_close(rstd, same[2], truth[2], "rstd")
    if ones_column is not None:
        assert (out[:, K + ones_column] == 1).all()


@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "alone"])
@pytest.mark.parametrize("P", [0, 64, 128])
@pytest.mark.parametrize("K", [64, 123])
def test_forward(
    product: str, dtype: torch.dtype, device: str, K: int, P: int, with_delta: bool
) -> None:
    _check_forward(40, K, P, dtype, device, with_delta=with_delta)


@pytest.mark.parametrize("M", [0, 1, 17])
def test_forward_with_few_rows(product: str, dtype: torch.dtype, device: str, M: int) -> None:
    _check_forward(M, 123, 64, dtype, device)


def test_forward_with_dropout_and_ones(product: str, dtype: torch.dtype, device: str) -> None:
    _check_forward(40, 123, 64, dtype, device, dropout=DROPOUT)
    _check_forward(40, 123, 64, dtype, device, dropout=DROPOUT, ones_column=63)
    _check_forward(40, 123, 64, dtype, device, ones_column=55)


@pytest.mark.parametrize("eps", [0.1, 1e-6])
def test_eps_counts(product: str, dtype: torch.dtype, device: str, eps: float) -> None:
    # the squares are of eps' size
    _check_forward(17, 64, 64, dtype, device, eps=eps, scale=eps**0.5)


def test_many_rank_columns(product: str, dtype: torch.dtype, device: str) -> None:
    # more than the tiles' accumulator holds, and no power of 2
    _check_forward(17, 64, 192, dtype, device)
    _check_backward(17, 64, 192, dtype, device, adapter_columns=192)


def test_forward_in_place(product: str, dtype: torch.dtype, device: str) -> None:
    M, K, P = 17, 123, 64
    residual, delta = (_strided(M, K, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(K, device=device).to(dtype)
    a = _strided(P, K, dtype=dtype, device=device)

    def run(residual_in: torch.Tensor, residual_out: torch.Tensor) -> torch.Tensor:
        out = poisoned(M, K + P, dtype=dtype, device=device)
        rstd = poisoned(M, dtype=_rstd_dtype(dtype), device=device)
        add_rms_norm_forward(residual_in, delta, weight, EPS, out, a, residual_out, rstd)
        return out

    separate = poisoned(M, K, dtype=dtype, device=device)
    expected = run(residual, separate)
    assert torch.equal(run(residual, residual), expected)
    assert torch.equal(residual, separate)


def _check_backward(
    M: int,
    K: int,
    P: int,
    dtype: torch.dtype,
    device: str,
    *,
    adapter_columns: int = 0,
    with_residual: bool = True,
    in_place: bool = False,
    x_out: str = "none",
) -> None:
    dx = _strided(M, K, dtype=dtype, device=device)
    residual = _strided(M, K, dtype=dtype, device=device)
    weight = torch.randn(K, device=device).to(dtype)
    rstd64 = torch.rsqrt(residual.double().square().mean(1) + EPS)
    sb = _strided(K, P, dtype=dtype, device=device) if P else None
    d_residual = _strided(M, K + P, dtype=dtype, device=device) if with_residual else None
    adapter = adapter64 = None
    if adapter_columns:
        g = _strided(M, adapter_columns, dtype=dtype, device=device)
        a = _strided(adapter_columns, K, dtype=dtype, device=device)
        adapter = (g, a, DROPOUT)
        adapter64 = (g.double(), a.double(), DROPOUT)

    dx64, residual64, weight64, d_residual64, sb64 = _double(dx, residual, weight, d_residual, sb)
    truth = reference_rms_norm_backward(
        dx64, residual64, rstd64, weight64, d_residual64, sb64, adapter64
    )
    same = reference_rms_norm_backward(
        dx, residual, rstd64.to(dtype), weight, d_residual, sb, adapter
    )
    if in_place:
        assert d_residual is not None
        out = d_residual
    else:
        out = _outputs(M, K + P, dtype=dtype, device=device)
    x = None
    if x_out != "none":
        x = dx if x_out == "dx" else _outputs(M, K, dtype=dtype, device=device)
    rms_norm_backward(
        dx, residual, rstd64.to(_rstd_dtype(dtype)), weight, d_residual, out, sb,
        adapter=adapter, x_out=x,
    )  # fmt: skip
    _assert_close(out[:, :K], same[0][:, :K], truth[0][:, :K], "dv")
    _assert_close(out[:, K:], same[0][:, K:], truth[0][:, K:], "G")
    if x is not None:
        _assert_close(x, same[1], truth[1], "x")


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("P", [0, 64, 128])
@pytest.mark.parametrize("K", [64, 123])
def test_backward(
    product: str, dtype: torch.dtype, device: str, K: int, P: int, with_residual: bool
) -> None:
    _check_backward(40, K, P, dtype, device, with_residual=with_residual)


@pytest.mark.parametrize("M", [0, 1, 17])
def test_backward_with_few_rows(product: str, dtype: torch.dtype, device: str, M: int) -> None:
    _check_backward(M, 123, 64, dtype, device, adapter_columns=64, x_out="separate")


@pytest.mark.parametrize("x_out", ["none", "separate", "dx"])
@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@pytest.mark.parametrize("adapter_columns", [0, 64])
def test_backward_with_adapter_and_aliases(
    product: str,
    dtype: torch.dtype,
    device: str,
    adapter_columns: int,
    in_place: bool,
    x_out: str,
) -> None:
    _check_backward(
        17, 123, 64, dtype, device,
        adapter_columns=adapter_columns, in_place=in_place, x_out=x_out,
    )  # fmt: skip


@pytest.mark.parametrize("P", [0, 64])
def test_backward_where_only_one_group_has_an_adapter(
    product: str, dtype: torch.dtype, device: str, P: int
) -> None:
    _check_backward(17, 123, P, dtype, device, adapter_columns=128, x_out="dx")


def test_kernels_are_the_gradient_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Autograd through the reference's forward, dropout included, in fp64."""
    M, K, P, dtype = 17, 123, 64, torch.float64
    residual = torch.randn(M, K, dtype=dtype, device=device, requires_grad=True)
    delta, dy = (torch.randn(M, K, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(K, dtype=dtype, device=device)
    a = torch.randn(P, K, dtype=dtype, device=device)
    g = torch.randn(M, P, dtype=dtype, device=device)
    out, v, rstd = reference_add_rms_norm_forward(residual, delta, weight, EPS, a, DROPOUT)
    (expected,) = torch.autograd.grad((out * torch.cat([dy, g], 1)).sum(), residual)
    for product in PRODUCTS:
        _choose(monkeypatch, product)
        d_v = poisoned(M, K, dtype=dtype, device=device)
        rms_norm_backward(
            dy, v.detach(), rstd.detach(), weight, None, d_v, None, adapter=(g, a, DROPOUT)
        )
        torch.testing.assert_close(d_v, expected, rtol=1e-12, atol=1e-12)


def test_recomputed_x_is_the_forwards(product: str, dtype: torch.dtype, device: str) -> None:
    M, K = 17, 123
    residual = _strided(M, K, dtype=dtype, device=device)
    weight = torch.randn(K, device=device).to(dtype)
    a = torch.zeros(64, K, dtype=dtype, device=device)
    out = poisoned(M, K + 64, dtype=dtype, device=device)
    rstd = poisoned(M, dtype=_rstd_dtype(dtype), device=device)
    add_rms_norm_forward(residual, None, weight, EPS, out, a, None, rstd)
    x = poisoned(M, K, dtype=dtype, device=device)
    scratch = poisoned(M, K + 64, dtype=dtype, device=device)
    rms_norm_backward(x.nan_to_num(1), residual, rstd, weight, None, scratch, a.T.contiguous(),
                      x_out=x)  # fmt: skip
    assert torch.equal(x, out[:, :K])
    rms_norm_backward(x.clone(), residual, rstd, weight, None, scratch, a.T.contiguous(),
                      adapter=(out[:, K:], a, DROPOUT), x_out=x)  # fmt: skip
    kept = apply_dropout_reference(torch.ones_like(x), DROPOUT) != 0
    assert torch.equal(x != 0, kept & (out[:, :K] != 0))


def test_rejects_what_it_cannot_read(device: str) -> None:
    x = torch.randn(8, 64, device=device)
    weight = torch.randn(64, device=device)
    rstd = torch.empty(8, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        add_rms_norm_forward(
            torch.randn(64, 8, device=device).T, None, weight, EPS, x, None, None, rstd
        )
    with pytest.raises(ValueError, match="residual_out"):
        add_rms_norm_forward(x, x, weight, EPS, x, None, None, rstd)
    with pytest.raises(ValueError, match="out_aug"):
        add_rms_norm_forward(
            x, None, weight, EPS, x, torch.randn(64, 64, device=device), None, rstd
        )
    with pytest.raises(ValueError, match="ones_column"):
        add_rms_norm_forward(x, None, weight, EPS, x, None, None, rstd, ones_column=0)
    with pytest.raises(ValueError, match="rstd_M"):
        rms_norm_backward(x, x, rstd.double(), weight, None, x, None)
    with pytest.raises(ValueError, match="d_residual_in"):
        rms_norm_backward(x, x, rstd, weight, x[:, :63], x, None)
