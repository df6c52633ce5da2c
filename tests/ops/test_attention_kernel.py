from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from truth import assert_close_to_truth, poisoned

from lora_kernels import attention, launch
from lora_kernels.attention import attention_backward, attention_forward
from lora_kernels.reference import (
    reference_attention_backward,
    reference_attention_forward,
)

# blocks of wide dtypes have 16 and 32 tokens: less than one, one, one and a token
MIXED = [5, 1, 0, 33, 16]
# out, lse, dq, dk and dv
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Make = Callable[..., list[torch.Tensor]]


@pytest.fixture
def make(device: str, dtype: torch.dtype) -> Make:
    """Random q, k, v and dout; the first three are slices of one buffer."""

    def make(
        num_tokens: int, heads: int = 2, key_heads: int = 1, head_dim: int = 16
    ) -> list[torch.Tensor]:
        counts = [heads, key_heads, key_heads, heads]
        wide = poisoned(num_tokens, sum(counts) * head_dim + 16, dtype=dtype, device=device)
        rows = wide[:, : sum(counts) * head_dim]
        rows.copy_(torch.randn(rows.shape, device=device))
        return list(rows.unflatten(1, (-1, head_dim)).split(counts, 1))

    return make


def _borders(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _outputs(*shapes: torch.Size, like: torch.Tensor) -> list[torch.Tensor]:
    """Poisoned slices of one buffer; after the last one some columns are left."""
    num_tokens, head_dim = shapes[0][0], shapes[0][2]
    counts = [shape[1] for shape in shapes]
    wide = poisoned(
        num_tokens, sum(counts) * head_dim + 8, dtype=like.dtype, device=str(like.device)
    )
    return list(wide[:, :-8].unflatten(1, (-1, head_dim)).split(counts, 1))


def _rest_is_untouched(output: torch.Tensor) -> bool:
    assert output._base is not None
    return bool(output._base[:, -8:].isnan().all())


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    lengths: list[int],
    window: int | None = None,
    max_seqlen: int | None = None,
) -> Results:
    borders = _borders(lengths, q.device)
    longest = max(lengths, default=0) if max_seqlen is None else max_seqlen
    options = {"scale": q.shape[2] ** -0.5, "window": window}
    (out,) = _outputs(q.shape, like=q)
    lse = attention_forward(q, k, v, borders, longest, out, **options)
    dq, dk, dv = _outputs(q.shape, k.shape, v.shape, like=q)
    attention_backward(d_out, q, k, v, out, lse, borders, longest, dq, dk, dv, **options)
    assert _rest_is_untouched(out) and _rest_is_untouched(dq)
    return out, lse, dq, dk, dv


def _reference(
    inputs: list[torch.Tensor], lengths: list[int], window: int | None, dtype: torch.dtype
) -> Results:
    q, k, v, d_out = (x.to(dtype) for x in inputs)
    borders = _borders(lengths, q.device)
    options = {"scale": q.shape[2] ** -0.5, "window": window}
    return (
        *reference_attention_forward(q, k, v, borders, **options),
        *reference_attention_backward(d_out, q, k, v, borders, **options),
    )


def _check(inputs: list[torch.Tensor], lengths: list[int], window: int | None = None) -> Results:
    results = _run(*inputs, lengths, window)
    references = _reference(inputs, lengths, window, inputs[0].dtype)
    truths = _reference(inputs, lengths, window, torch.float64)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, result, reference, truth in zip(names, results, references, truths, strict=True):
        assert_close_to_truth(result, reference, truth, name)
    return results


def _use_blocks(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, branch: bool) -> None:
    tables = launch.launch_config

    def launch_config(kernel: str, device: torch.device, width: int) -> dict[str, object]:
        config = tables(kernel, device, width)
        if "BLOCK_M" in config:
            config |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BRANCH": branch}
        return config

    monkeypatch.setattr(launch, "launch_config", launch_config)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [17], [64], MIXED], ids=str)
def test_any_lengths(make: Make, lengths: list[int]) -> None:
    inputs = make(sum(lengths))
    results = _check(inputs, lengths)
    for result, again in zip(results, _run(*inputs, lengths), strict=True):
        assert torch.equal(result, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
# a window of 1 leaves gradients that are nothing but rounding: test_window_of_one_token_and_of_all
@pytest.mark.parametrize("window", [None, 2, 100, 200])
def test_blocks_of_the_launch_tables(make: Make, head_dim: int, window: int | None) -> None:
    lengths = [300, 1, 128, 0, 129, 1000, 64]
    inputs = make(sum(lengths), 8, 2, head_dim)
    results = _check(inputs, lengths, window)
    for result, again in zip(results, _run(*inputs, lengths, window), strict=True):
        assert torch.equal(result, again)


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (3, 1), (4, 2)])
def test_any_groups(make: Make, heads: int, key_heads: int) -> None:
    _check(make(35, heads, key_heads), [34, 1])


@pytest.mark.parametrize("head_dim", [24, 80])
def test_any_head_dim(make: Make, head_dim: int) -> None:
    _check(make(34, head_dim=head_dim), [1, 33])


@pytest.mark.parametrize("window", [2, 40])
def test_window(make: Make, window: int) -> None:
    _check(make(51), [50, 1], window)


def test_window_of_one_token_and_of_all(make: Make) -> None:
    inputs = make(34, 1, 1)
    _, _, v, d_out = inputs
    out, _, dq, dk, dv = _run(*inputs, [33, 1], 1)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(dv, d_out)
    for gradient in (dq, dk):
        # a difference of two equal sums, each rounded in its own order
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)
    whole = _run(*inputs, [33, 1])
    for result, expected in zip(_run(*inputs, [33, 1], 33), whole, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("block_m", "block_n", "branch"),
    [(16, 32, True), (16, 32, False), (32, 16, False), (64, 32, True)],
)
def test_any_blocks(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    block_m: int,
    block_n: int,
    branch: bool,
    window: int | None,
) -> None:
    _use_blocks(monkeypatch, block_m, block_n, branch)
    _check(make(38), [37, 1], window)


def test_any_strides(device: str, dtype: torch.dtype) -> None:
    # heads before tokens, and tokens that are far apart
    q, d_out = (torch.randn(2, 41, 16, dtype=dtype, device=device).transpose(0, 1) for _ in "qd")
    k, v = torch.randn(41, 2, 48, dtype=dtype, device=device)[:, :, 16:].split(16, 2)
    _check([q, k, v, d_out], [40, 1])


@pytest.mark.parametrize("window", [None, 20])
def test_neighbours_do_not_matter(make: Make, window: int | None) -> None:
    lengths = [7, 34, 5]
    inputs = make(sum(lengths))
    packed = _run(*inputs, lengths, window)
    part = slice(7, 41)
    alone = _run(*(x[part] for x in inputs), [34], window)
    # a list of blocks that is longer than needed
    roomy = _run(*(x[part] for x in inputs), [34, 0], window, max_seqlen=1000)
    for index, (name, whole) in enumerate(
        zip(("out", "lse", "dq", "dk", "dv"), packed, strict=True)
    ):
        expected = whole[:, part] if name == "lse" else whole[part]
        assert torch.equal(alone[index], expected), name
        assert torch.equal(roomy[index], expected), name


def test_large_scores(make: Make) -> None:
    q, k, v, d_out = make(41)
    inputs = [q * 100, k * 100, v, d_out]
    out, lse, *gradients = _run(*inputs, [40, 1])
    truth, true_lse, *_ = _reference(inputs, [40, 1], None, torch.float64)
    # products of that size are known to fewer digits
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-2, atol=1)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert (out.double() - truth).abs().max() < 0.1


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [([3, 40, 0, 17, 33, 16], 40), ([1] * 70, 1), ([300, 2, 299], 1000), ([0], 5), ([64] * 3, 64)],
    ids=str,
)
def test_list_of_tiles(device: str, lengths: list[int], max_seqlen: int) -> None:
    num_tokens = sum(lengths)
    borders = _borders(lengths, torch.device(device))
    tiles = attention._list_tiles(borders, max_seqlen, num_tokens, 16)
    listed = [tuple(tile) for tile in tiles.T.tolist() if tile[1]]
    expected = [
        (start, length, block * 16)
        for start, length in zip(borders.tolist(), lengths, strict=False)
        for block in range(-(-length // 16))
    ]
    assert listed == sorted(expected, key=lambda tile: (-tile[2], tile[0]))
    # what is left over is at the end
    assert (tiles[1, len(listed) :] == 0).all()


def test_reference_is_scaled_dot_product_attention(device: str) -> None:
    lengths = [9, 1, 20]
    q, k, v = (
        torch.randn(30, heads, 16, dtype=torch.float64, device=device, requires_grad=True)
        for heads in (4, 2, 2)
    )
    d_out = torch.randn_like(q)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in sequence), is_causal=True, scale=0.3, enable_gqa=True
        ).transpose(0, 1)
        for sequence in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    truth = torch.cat(parts)
    truth.backward(d_out)
    borders = _borders(lengths, q.device)
    arguments = [x.detach() for x in (q, k, v)]
    out, lse = reference_attention_forward(*arguments, borders, scale=0.3)
    torch.testing.assert_close(out, truth)
    # of the first tokens, which see only themselves
    alone = (q[0].reshape(2, 2, 16) * k[0][:, None]).sum(2).flatten() * 0.3
    torch.testing.assert_close(lse[:, 0], alone.detach() / torch.log(torch.tensor(2.0).double()))
    for found, tensor in zip(
        reference_attention_backward(d_out, *arguments, borders, scale=0.3), (q, k, v), strict=True
    ):
        torch.testing.assert_close(found, tensor.grad)


def test_wrong_arguments_are_refused(device: str) -> None:
    q, k, v = (torch.zeros(4, heads, 16, device=device) for heads in (4, 2, 2))
    borders = _borders([3, 1], q.device)

    def forward(
        q: torch.Tensor = q,
        k: torch.Tensor = k,
        v: torch.Tensor = v,
        borders: torch.Tensor = borders,
        longest: int = 3,
        scale: float = 1.0,
        window: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(q) if out is None else out
        return attention_forward(q, k, v, borders, longest, out, scale=scale, window=window)

    lse = forward()
    with pytest.raises(ValueError, match="cannot share 3 heads"):
        forward(k=torch.zeros(4, 3, 16, device=device))
    with pytest.raises(ValueError, match="cannot share 0 heads"):
        forward(k=torch.zeros(4, 0, 16, device=device))
    with pytest.raises(ValueError, match="head dimension 8"):
        forward(q[:, :, :8], k[:, :, :8], v[:, :, :8])
    with pytest.raises(ValueError, match="head dimension 512"):
        forward(q.repeat(1, 1, 32), k.repeat(1, 1, 32), v.repeat(1, 1, 32))
    with pytest.raises(ValueError, match="v: expected"):
        forward(v=v[:3])
    with pytest.raises(ValueError, match="k: expected .*float32"):
        forward(k=k.double())
    with pytest.raises(ValueError, match="q: heads must be contiguous"):
        forward(q=torch.zeros(4, 4, 32, device=device)[:, :, ::2])
    with pytest.raises(ValueError, match="k: heads are too far apart"):
        forward(k=torch.empty_strided((4, 2, 16), (16, 2**30, 1), device="meta"))
    with pytest.raises(ValueError, match="out: expected"):
        forward(out=q[:, :2])
    with pytest.raises(ValueError, match="cu_seqlens: expected .*int32"):
        forward(borders=borders.long())
    with pytest.raises(ValueError, match="do not make 4"):
        forward(longest=1)
    with pytest.raises(ValueError, match="scale 0"):
        forward(scale=0.0)
    with pytest.raises(ValueError, match="window 0"):
        forward(window=0)

    def backward(lse: torch.Tensor = lse, **replaced: torch.Tensor) -> None:
        tensors = {name: torch.zeros_like(q) for name in ("d_out", "out", "dq")}
        tensors |= {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)} | replaced
        attention_backward(
            q=q, k=k, v=v, lse=lse, cu_seqlens=borders, max_seqlen=3, scale=1.0, **tensors
        )

    backward()
    for name in ("d_out", "out", "dq", "dk", "dv"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            backward(**{name: torch.zeros(4, 1, 16, device=device)})
    with pytest.raises(ValueError, match="lse: expected"):
        backward(lse.double())
    with pytest.raises(ValueError, match="lse: must be contiguous"):
        backward(torch.zeros(4, 8, device=device)[:, :4])
