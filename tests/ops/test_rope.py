from typing import Any

import pytest
import torch
from truth import assert_close_to_truth, poisoned, strided

from lora_kernels import launch, rope
from lora_kernels.reference import reference_rope_backward, reference_rope_forward
from lora_kernels.rope import HeadNorms, rope_backward, rope_forward

EPS = 1e-5
# heads of q, heads of k and v, columns of a head
SHAPES = [(4, 2, 64), (5, 1, 80), (3, 3, 96), (9, 3, 128)]
Slots = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
# slots of q, k and v, rank columns
SLOTS: list[tuple[Slots, int]] = [
    (((0, 16), (16, 16), (32, 16)), 64),
    (((0, 0), (0, 16), (16, 0)), 64),
    (((64, 48), (0, 64), (112, 16)), 192),
    (((0, 16), (48, 0), (32, 16)), 64),
    (((0, 0), (0, 0), (0, 0)), 64),
    (((0, 80), (80, 16), (96, 16)), 128),
]


@pytest.fixture(params=["mm", "kernel"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to make G; few programs, as each takes the interpreter long."""
    tables = launch.launch_config

    def launch_config(kernel: str, device: torch.device, width: int) -> dict[str, Any]:
        config = tables(kernel, device, width)
        if "PRODUCT" in config:
            config["PRODUCT"] = request.param
        if "BLOCK_H" in config:
            config |= {"BLOCK_M": 16, "BLOCK_H": 4}
        return config

    monkeypatch.setattr(launch, "launch_config", launch_config)
    # the interpreter's dtypes are the wide ones, which take "mm" otherwise
    monkeypatch.setattr(rope, "_BYTES_IN_KERNEL", 8)
    return request.param


def _angles(
    num_rows: int, head_columns: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(num_rows, head_columns // 2, dtype=torch.float64, device=device) * 7
    # scaled, as yarn does: the gradient is the transpose, not the inverse
    wide = (torch.cat([angles.cos(), angles.sin()], 1) * 1.2).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    cos, sin = wide.chunk(2, 1)
    return cos, sin


def _norms(head_columns: int, dtype: torch.dtype, device: str) -> HeadNorms:
    q_weight, k_weight = torch.randn(2, head_columns, device=device).to(dtype)
    return HeadNorms(q_weight, k_weight, EPS)


def _as(dtype: torch.dtype, norms: HeadNorms | None) -> HeadNorms | None:
    return norms and HeadNorms(norms.q_weight.to(dtype), norms.k_weight.to(dtype), norms.eps)


def _check_forward(
    num_rows: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    with_norms: bool,
    scale: float = 1.0,
) -> None:
    num_heads, num_kv_heads, head_columns = shape
    num_columns = (num_heads + 2 * num_kv_heads) * head_columns
    num_rotated = (num_heads + num_kv_heads) * head_columns
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    qkv = strided(num_rows, num_columns, dtype=dtype, device=device) * scale
    cos, sin = _angles(num_rows, head_columns, dtype, device)
    norms = _norms(head_columns, dtype, device) if with_norms else None
    truth = reference_rope_forward(
        qkv.double(), cos.double(), sin.double(), **heads, norms=_as(torch.float64, norms)
    )
    # torch in fp32 where the angles are, rounded once
    same = reference_rope_forward(qkv, cos, sin, **heads, norms=norms).to(dtype)

    results = []
    for _ in range(2):
        wide = poisoned(num_rows, num_columns + 16, dtype=dtype, device=device)
        read = wide[:, :num_columns]
        read.copy_(qkv)
        if norms is None:
            rope_forward(read, cos, sin, **heads)
            assert torch.equal(read[:, num_rotated:], qkv[:, num_rotated:])
            assert wide[:, num_columns:].isnan().all()
            results.append(read[:, :num_rotated])
        else:
            out = poisoned(num_rows, num_rotated + 16, dtype=dtype, device=device)
            rope_forward(read, cos, sin, **heads, norms=norms, out_qk=out[:, :num_rotated])
            assert torch.equal(read, qkv)
            assert out[:, num_rotated:].isnan().all()
            results.append(out[:, :num_rotated])
    assert torch.equal(*results)
    assert_close_to_truth(results[0], same, truth, "q and k")


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_of_any_heads(
    dtype: torch.dtype, device: str, shape: tuple[int, int, int], with_norms: bool
) -> None:
    _check_forward(17, shape, dtype, device, with_norms=with_norms)


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_forward_of_any_size(
    dtype: torch.dtype, device: str, num_rows: int, with_norms: bool
) -> None:
    _check_forward(num_rows, SHAPES[0], dtype, device, with_norms=with_norms)


def test_eps_counts(dtype: torch.dtype, device: str) -> None:
    # the squares are of its size
    _check_forward(17, SHAPES[0], dtype, device, with_norms=True, scale=EPS**0.5)


def test_forward_is_that_of_transformers(device: str) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    num_rows, num_heads, head_columns = 17, 3, 64
    qkv = torch.randn(num_rows, 5 * head_columns, dtype=torch.float64, device=device)
    cos, sin = _angles(num_rows, head_columns, torch.float64, device)
    norms = _norms(head_columns, torch.float64, device)
    x = qkv.unflatten(1, (-1, head_columns))
    q, k = x[:, :num_heads], x[:, num_heads : num_heads + 1]
    parts = []
    for part, weight in ((q, norms.q_weight), (k, norms.k_weight)):
        norm = Qwen3RMSNorm(head_columns, EPS).to(part)
        norm.weight.data.copy_(weight)
        parts.append(norm(part))
    for own_norms, heads in ((None, (q, k)), (norms, parts)):
        expected = torch.cat(
            apply_rotary_pos_emb(*heads, torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)), 1
        )
        actual = reference_rope_forward(
            qkv, cos, sin, num_heads=num_heads, num_kv_heads=1, norms=own_norms
        )
        # their norm works in fp32
        torch.testing.assert_close(actual, expected.flatten(1), rtol=1e-5, atol=1e-5)


def _block_diagonal(
    shape: tuple[int, int, int], slots: Slots, rank_columns: int, dtype: torch.dtype, device: str
) -> torch.Tensor:
    num_heads, num_kv_heads, head_columns = shape
    num_columns = (num_heads + 2 * num_kv_heads) * head_columns
    sb = torch.zeros(num_columns, rank_columns + 8, dtype=dtype, device=device)[:, 8:]
    end = 0
    row = 0
    for (first, width), heads in zip(slots, (num_heads, num_kv_heads, num_kv_heads), strict=True):
        rows = slice(row, row + heads * head_columns)
        row = rows.stop
        values = torch.randn(heads * head_columns, width, device=device) * num_columns**-0.5
        sb[rows, first : first + width] = values.to(dtype)
        end = max(end, first + width if width else 0)
    if end < rank_columns:
        # a bias, which is none of G's business
        sb[:, end] = 1
    return sb


def _check_backward(
    num_rows: int,
    shape: tuple[int, int, int],
    slots: Slots,
    rank_columns: int,
    dtype: torch.dtype,
    device: str,
    *,
    with_adapter: bool = True,
    with_norms: bool = False,
    in_place: str = "",
) -> None:
    num_heads, num_kv_heads, head_columns = shape
    widths = {"q": num_heads * head_columns, "k": num_kv_heads * head_columns}
    widths["v"] = widths["k"]
    num_columns = sum(widths.values())
    gradients = {
        name: strided(num_rows, width, dtype=dtype, device=device) for name, width in widths.items()
    }
    cos, sin = _angles(num_rows, head_columns, dtype, device)
    norms = qkv = sb = None
    if with_norms:
        norms = _norms(head_columns, dtype, device)
        qkv = strided(num_rows, num_columns, dtype=dtype, device=device)
    if with_adapter:
        sb = _block_diagonal(shape, slots, rank_columns, dtype, device)

    def reference(as_dtype: torch.dtype) -> torch.Tensor:
        return reference_rope_backward(
            *(d.to(as_dtype) for d in gradients.values()),
            cos.to(as_dtype), sin.to(as_dtype), None if sb is None else sb.to(as_dtype),
            slots=slots, rank_columns=rank_columns, norms=_as(as_dtype, norms),
            qkv_MN=None if qkv is None else qkv.to(as_dtype),
        )  # fmt: skip

    same, truth = reference(dtype), reference(torch.float64)
    results = []
    for _ in range(2):
        wide = poisoned(num_rows, num_columns + rank_columns + 16, dtype=dtype, device=device)
        out = wide[:, : num_columns + rank_columns]
        views = dict(zip("qkv", out[:, :num_columns].split(list(widths.values()), 1), strict=True))
        arguments = []
        for name, gradient in gradients.items():
            if name in in_place:
                views[name].copy_(gradient)
            arguments.append(views[name] if name in in_place else gradient.clone())
        rope_backward(*arguments, out, cos, sin, sb, slots=slots, norms=norms, qkv_MN=qkv)
        for name, gradient, argument in zip("qkv", gradients.values(), arguments, strict=True):
            assert name in in_place or torch.equal(gradient, argument)
        assert wide[:, num_columns + rank_columns :].isnan().all()
        results.append(out)
    assert torch.equal(*results)

    out = results[0]
    parts = {}
    is_free = torch.ones(rank_columns, dtype=torch.bool)
    column = 0
    for (name, width), (first, rank) in zip(widths.items(), slots, strict=True):
        parts[f"d{name}"] = slice(column, column + width)
        column += width
        parts[f"G of {name}"] = slice(num_columns + first, num_columns + first + rank)
        is_free[first : first + rank] = False
    for name, part in parts.items():
        assert_close_to_truth(out[:, part], same[:, part], truth[:, part], name)
    assert (out[:, num_columns:][:, is_free] == 0).all()
    assert torch.equal(out[:, parts["dv"]], gradients["v"])


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_of_any_heads(
    product: str, dtype: torch.dtype, device: str, shape: tuple[int, int, int]
) -> None:
    _check_backward(17, shape, *SLOTS[0], dtype, device, with_norms=True)


@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_backward_of_any_size(product: str, dtype: torch.dtype, device: str, num_rows: int) -> None:
    _check_backward(num_rows, SHAPES[0], *SLOTS[0], dtype, device, with_norms=True)


@pytest.mark.parametrize(("slots", "rank_columns"), SLOTS)
def test_backward_of_any_slots(
    product: str, dtype: torch.dtype, device: str, slots: Slots, rank_columns: int
) -> None:
    _check_backward(17, SHAPES[1], slots, rank_columns, dtype, device)


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("in_place", ["qkv", "v", "qk"])
def test_backward_in_place(
    product: str, dtype: torch.dtype, device: str, in_place: str, with_norms: bool
) -> None:
    # a slot for v and none
    slots, rank_columns = SLOTS[0] if in_place == "qkv" else SLOTS[1]
    _check_backward(
        17, SHAPES[0], slots, rank_columns, dtype, device,
        with_norms=with_norms, in_place=in_place,
    )  # fmt: skip


@pytest.mark.parametrize("rank_columns", [0, 64])
def test_backward_without_adapter(dtype: torch.dtype, device: str, rank_columns: int) -> None:
    for in_place in ("", "qkv"):
        _check_backward(
            17, SHAPES[0], SLOTS[4][0], rank_columns, dtype, device,
            with_adapter=False, in_place=in_place,
        )  # fmt: skip


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
def test_backward_is_the_gradient_of_forward(device: str, with_norms: bool) -> None:
    num_heads, num_kv_heads, head_columns = SHAPES[1]
    dtype = torch.float64
    num_columns = (num_heads + 2 * num_kv_heads) * head_columns
    widths = [num_heads * head_columns, num_kv_heads * head_columns, num_kv_heads * head_columns]
    qkv = torch.randn(17, num_columns, dtype=dtype, device=device, requires_grad=True)
    d = torch.randn(17, num_columns, dtype=dtype, device=device)
    cos, sin = _angles(17, head_columns, dtype, device)
    norms = _norms(head_columns, dtype, device) if with_norms else None
    rotated = reference_rope_forward(
        qkv, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, norms=norms
    )
    (expected,) = torch.autograd.grad(torch.cat([rotated, qkv[:, -widths[2] :]], 1), qkv, d)
    out = poisoned(17, num_columns, dtype=dtype, device=device)
    rope_backward(
        *d.split(widths, 1), out, cos, sin, None, slots=SLOTS[4][0], norms=norms,
        qkv_MN=qkv.detach() if with_norms else None,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_refused(device: str) -> None:
    qkv = torch.zeros(4, 256, device=device)
    cos = sin = torch.zeros(4, 32, device=device)
    norms = HeadNorms(torch.ones(64, device=device), torch.ones(64, device=device), EPS)
    heads = {"num_heads": 2, "num_kv_heads": 1}
    out_qk = torch.zeros(4, 192, device=device)
    with pytest.raises(ValueError, match="even width"):
        rope_forward(qkv[:, :255], cos, sin, **heads)
    with pytest.raises(ValueError, match="even width"):
        rope_forward(qkv[:, :252], cos, sin, **heads)
    with pytest.raises(ValueError, match="out_qk is given"):
        rope_forward(qkv, cos, sin, **heads, norms=norms)
    with pytest.raises(ValueError, match="out_qk is given"):
        rope_forward(qkv, cos, sin, **heads, out_qk=out_qk)
    with pytest.raises(ValueError, match="out_qk: expected"):
        rope_forward(qkv, cos, sin, **heads, norms=norms, out_qk=qkv)
    with pytest.raises(ValueError, match="cos: expected"):
        rope_forward(qkv, cos[:, :31], sin, **heads)
    with pytest.raises(ValueError, match="sin: expected"):
        rope_forward(qkv, cos, sin.double(), **heads)
    with pytest.raises(ValueError, match="qkv_MN: rows must be contiguous"):
        rope_forward(qkv.T.contiguous().T, cos, sin, **heads)
    with pytest.raises(ValueError, match="k_weight"):
        bad = HeadNorms(norms.q_weight, norms.k_weight[:32], EPS)
        rope_forward(qkv, cos, sin, **heads, norms=bad, out_qk=out_qk)

    dq, dk, dv = qkv.split([128, 64, 64], 1)
    out = torch.zeros(4, 320, device=device)
    sb = torch.zeros(256, 64, device=device)
    slots = ((0, 16), (16, 16), (32, 16))

    def backward(*changed: torch.Tensor | None, **more: Any) -> None:
        arguments: list[Any] = [dq, dk, dv, out, cos, sin, sb]
        arguments[: len(changed)] = changed
        rope_backward(*arguments, **{"slots": slots} | more)

    backward()
    with pytest.raises(ValueError, match="dq: expected"):
        backward(qkv[:, :127])
    with pytest.raises(ValueError, match="dk: rows must be contiguous"):
        backward(dq, dk.T.contiguous().T)
    with pytest.raises(ValueError, match="dv: expected"):
        backward(dq, dk, dq)
    with pytest.raises(ValueError, match="out_aug: expected"):
        backward(dq, dk, dv, out[:, :255])
    with pytest.raises(ValueError, match="sb: expected"):
        backward(dq, dk, dv, out[:, :256])
    with pytest.raises(ValueError, match="qkv_MN is given"):
        backward(norms=norms)
    with pytest.raises(ValueError, match="qkv_MN is given"):
        backward(qkv_MN=qkv)
    with pytest.raises(ValueError, match="qkv_MN: expected"):
        backward(norms=norms, qkv_MN=out)
    with pytest.raises(ValueError, match="q_weight"):
        backward(norms=HeadNorms(norms.q_weight.double(), norms.k_weight, EPS), qkv_MN=qkv)
    with pytest.raises(ValueError, match="multiples of 16"):
        backward(slots=((0, 8), (16, 16), (32, 16)))
    with pytest.raises(ValueError, match="within 64"):
        backward(slots=((0, 16), (16, 16), (32, 48)))
    with pytest.raises(ValueError, match="overlap"):
        backward(slots=((0, 32), (16, 16), (32, 16)))
    with pytest.raises(ValueError, match="no adapter"):
        backward(dq, dk, dv, out, cos, sin, None)
