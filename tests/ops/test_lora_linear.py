from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from truth import assert_close_to_truth

from lora_kernels import launch, lora_linear
from lora_kernels.dropout import Dropout
from lora_kernels.lora_linear import AugmentedWeight
from lora_kernels.reference import reference_lora_linear

DROPOUT = Dropout(0.1, 12345, 6)
SCALING = 0.75
IMPLEMENTATIONS = ["addmm", "triton", "augmented"]
# M, K, N: empty, one token, odd widths, whole blocks
SIZES = [
    ((0, 24, 40), None), ((0, 24, 40), DROPOUT), ((1, 33, 17), None), ((17, 123, 75), DROPOUT),
    ((64, 128, 64), DROPOUT), ((64, 128, 64), None), ((70, 65, 130), None),
]  # fmt: skip


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way is taken, whatever the launch tables say."""
    if request.param != "augmented":
        _choose(monkeypatch, request.param)
    return request.param


def _choose(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    monkeypatch.setattr(lora_linear, "_implementation", lambda *_: implementation)


class Case:
    """The arguments of one call, as leaves that want gradients."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_out: int,
        rank: int = 8,
        *,
        dtype: torch.dtype,
        device: str,
        has_bias: bool = True,
        adapter_dtype: torch.dtype | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        num_in = shape[-1]
        make = {"dtype": dtype, "device": device}
        adapter = {"dtype": adapter_dtype or dtype, "device": device}
        self.x = torch.randn(shape, **make)
        self.weight = torch.randn(num_out, num_in, **make) * num_in**-0.5
        self.bias = torch.randn(num_out, **make) if has_bias else None
        self.lora_a = torch.randn(rank, num_in, **adapter) * num_in**-0.5
        self.lora_b = torch.randn(num_out, rank, **adapter) * rank**-0.5
        self.dy = torch.randn(*shape[:-1], num_out, **make)
        self.dropout = dropout

    def run(self, function: Callable[..., torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
        """Return the output and the gradients of x and the adapter."""
        leaves = {name: getattr(self, name) for name in ("x", "lora_a", "lora_b")}
        leaves |= {name: changes.pop(name) for name in list(changes) if name in leaves}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        arguments = {"weight": self.weight, "bias": self.bias, "dy": self.dy} | changes
        y = function(
            leaves["x"], arguments["weight"], arguments["bias"], leaves["lora_a"],
            leaves["lora_b"], SCALING, self.dropout,
        )  # fmt: skip
        y.backward(arguments["dy"])
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        return {"y": y.detach()} | gradients

    def reference(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        names = ("x", "lora_a", "lora_b", "weight", "dy")
        changes = {name: getattr(self, name).to(dtype) for name in names}
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.run(reference_lora_linear, bias=bias, **changes)

    def fused(self, implementation: str, **changes: Any) -> dict[str, torch.Tensor]:
        if implementation == "augmented":
            changes["weight"] = AugmentedWeight(self.weight, self.lora_a.shape[0], self.bias)
            changes["bias"] = None
        return self.run(lora_linear.lora_linear, **changes)

    def check(self, implementation: str, **changes: Any) -> dict[str, torch.Tensor]:
        """Hold all results to the bound, and a second run to the same bits."""
        results = self.fused(implementation, **changes)
        again = self.fused(implementation, **changes)
        same_dtype, truth = self.reference(self.weight.dtype), self.reference(torch.float64)
        for name, result in results.items():
            assert_close_to_truth(result, same_dtype[name], truth[name], name)
            assert torch.equal(result, again[name]), name
        return results


@pytest.mark.parametrize(("size", "dropout"), SIZES)
def test_any_size(
    device: str,
    dtype: torch.dtype,
    implementation: str,
    size: tuple[int, int, int],
    dropout: Dropout | None,
) -> None:
    m, k, n = size
    Case((m, k), n, dtype=dtype, device=device, dropout=dropout).check(implementation)


@pytest.mark.parametrize(
    ("rank", "dropout"), [(1, None), (16, DROPOUT), (63, None), (100, DROPOUT), (256, None)]
)
def test_any_rank(device: str, implementation: str, rank: int, dropout: Dropout | None) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case((17, 48), 40, rank, dtype=dtype, device=device, dropout=dropout)
    case.check(implementation)


def test_masters_of_fp32(device: str, implementation: str) -> None:
    # the interpreter's products in bf16 are wrong, in fp16 they are not
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    case = Case(
        (3, 5, 64), 32, dtype=dtype, device=device, has_bias=False, adapter_dtype=torch.float32
    )
    results = case.check(implementation)
    assert results["y"].dtype == results["gradient of x"].dtype == dtype
    assert results["gradient of lora_a"].dtype == torch.float32
    assert results["gradient of lora_b"].dtype == torch.float32


def test_strided_inputs(device: str, dtype: torch.dtype, implementation: str) -> None:
    case = Case((2, 5, 48), 40, dtype=dtype, device=device, dropout=DROPOUT)
    x, dy = case.x, case.dy
    # rows apart, with what must not be read between them; columns apart; every second token
    for make in (
        lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ):
        assert not make(x).is_contiguous() and torch.equal(make(x), x)
        case.check(implementation, x=make(x), dy=make(dy))


def test_expanded_gradient(device: str, dtype: torch.dtype, implementation: str) -> None:
    case = Case((17, 48), 40, dtype=dtype, device=device)
    case.dy = torch.ones((), dtype=dtype, device=device).expand(17, 40)
    assert case.dy.stride() == (0, 0)
    case.check(implementation)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
def test_gradcheck(implementation: str, dropout: Dropout | None) -> None:
    if implementation != "addmm" and torch.cuda.is_available():
        pytest.skip("fp64 products of Triton are for the interpreter")
    # small, as every element costs a forward
    case = Case((2, 5), 3, 1, dtype=torch.float64, device="cpu", dropout=dropout)
    weight, bias = case.weight, case.bias
    if implementation == "augmented":
        weight, bias = AugmentedWeight(weight, 1, bias), None
    elif dropout is not None and torch.cuda.is_available():
        pytest.skip("kernels need the interpreter on a CPU")
    leaves = [case.x, case.lora_a, case.lora_b] + ([] if bias is None else [bias])
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *bias: torch.Tensor) -> Any:
        given = bias[0] if bias else None
        return lora_linear.lora_linear(x, weight, given, a, b, SCALING, dropout)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("has_bias", [False, True])
def test_zero_b_is_the_base(
    device: str, dtype: torch.dtype, implementation: str, has_bias: bool
) -> None:
    case = Case((2, 32, 123), 75, dtype=dtype, device=device, has_bias=has_bias)
    zero = torch.zeros_like(case.lora_b)
    y = case.fused(implementation, lora_b=zero)["y"]
    base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    if implementation == "addmm":
        assert torch.equal(y, base)
    # the others sum in another order than the base, but A has no say
    truth = torch.nn.functional.linear(*(t.double() for t in (case.x, case.weight)))
    truth = truth if case.bias is None else truth + case.bias.double()
    assert_close_to_truth(y, base, truth)
    other = case.fused(implementation, lora_b=zero, lora_a=-3 * case.lora_a)["y"]
    assert torch.equal(y, other)


@pytest.mark.parametrize("wanted", [{"x"}, {"lora_a"}, {"lora_b"}, {"lora_a", "lora_b"}, {"bias"}])
def test_gradients_that_are_not_wanted(
    device: str, implementation: str, wanted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((17, 48), 40, dtype=torch.float32, device=device, dropout=DROPOUT)
    if implementation == "augmented":
        if wanted == {"bias"}:
            pytest.skip("its bias is frozen")
        case.bias = None
    leaves = {name: getattr(case, name) for name in ("x", "lora_a", "lora_b", "bias")}
    all_wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}

    def gradients(names: set[str]) -> list[torch.Tensor | None]:
        for name, leaf in all_wanted.items():
            leaf.requires_grad_(name in names).grad = None
        weight = AugmentedWeight(case.weight, 8) if implementation == "augmented" else case.weight
        y = lora_linear.lora_linear(
            case.x, weight, case.bias, case.lora_a, case.lora_b, SCALING, DROPOUT
        )
        saved = y.grad_fn.saved_tensors
        # x for A alone, H for B alone
        assert (saved[0] is not None) == ("lora_a" in names)
        assert (saved[1] is not None) == ("lora_b" in names)
        y.backward(case.dy)
        return [leaf.grad for leaf in all_wanted.values()]

    expected = gradients(set(all_wanted))
    for name, some, every in zip(all_wanted, gradients(wanted), expected, strict=True):
        if name in wanted:
            assert some is not None and every is not None
            torch.testing.assert_close(some, every)
        else:
            assert some is None
    if "x" not in wanted:
        # the first layer pays for no product with W in its backward
        monkeypatch.setattr(lora_linear, "_dx", None)
        monkeypatch.setattr(lora_linear, "_augmented_backward", None)
        gradients(wanted)


def test_saved_tensors_are_no_copies(device: str) -> None:
    case = Case((2, 9, 48), 40, dtype=torch.float16, device=device, adapter_dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
    x, a, b = leaves
    y = lora_linear.lora_linear(x, case.weight, None, a, b, SCALING)
    saved = y.grad_fn.saved_tensors
    sources = (x, None, case.weight, None, a, b)
    for tensor, source in zip(saved, sources, strict=True):
        if source is not None:
            assert tensor.data_ptr() == source.data_ptr()
    assert saved[1].shape == (18, 8) and saved[1].dtype == torch.float16


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device: str, adapter_dtype: torch.dtype) -> None:
    case = Case((2, 9, 48), 40, dtype=torch.float32, device=device, adapter_dtype=adapter_dtype)
    for run_backward_inside in (False, True):
        x, a, b = (t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
        with torch.autocast(device, torch.bfloat16):
            y = lora_linear.lora_linear(x, case.weight, case.bias, a, b, SCALING)
            if run_backward_inside:
                y.backward(case.dy.bfloat16())
        if not run_backward_inside:
            y.backward(case.dy.bfloat16())
        assert y.dtype == torch.bfloat16
        same_dtype, truth = case.reference(torch.bfloat16), case.reference(torch.float64)
        assert_close_to_truth(y.detach(), same_dtype["y"], truth["y"])
        for name, leaf in {"x": x, "lora_a": a, "lora_b": b}.items():
            assert leaf.grad.dtype == leaf.dtype
            key = f"gradient of {name}"
            assert_close_to_truth(leaf.grad, same_dtype[key], truth[key], key)


def test_backward_alone_under_autocast(device: str, implementation: str) -> None:
    case = Case((17, 48), 40, dtype=torch.float32, device=device)
    expected = case.fused(implementation)
    real = torch.Tensor.backward

    def backward(y: torch.Tensor, dy: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16):
            real(y, dy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        results = case.fused(implementation)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_autocast_leaves_fp64_alone(device: str) -> None:
    case = Case((3, 48), 40, dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert case.fused("addmm")["y"].dtype == torch.float64


def test_second_backward_is_refused(device: str, implementation: str) -> None:
    case = Case((3, 48), 40, dtype=torch.float32, device=device, has_bias=False)
    weight = AugmentedWeight(case.weight, 8) if implementation == "augmented" else case.weight
    case.lora_a.requires_grad_()

    def forward() -> torch.Tensor:
        return lora_linear.lora_linear(
            case.x.requires_grad_(), weight, None, case.lora_a, case.lora_b, SCALING
        )

    y = forward()
    y.backward(case.dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(case.dy)
    # kept on request, nothing has been overwritten
    y = forward()
    gradients = [torch.autograd.grad(y, case.x, case.dy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    (dx,) = torch.autograd.grad(y, case.x, case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_weights_changed_before_the_backward_are_noticed(device: str) -> None:
    case = Case((3, 48), 40, dtype=torch.float32, device=device)
    for name in ("weight", "lora_b"):
        y = lora_linear.lora_linear(
            case.x.requires_grad_(), case.weight, None, case.lora_a, case.lora_b, SCALING
        )
        getattr(case, name).mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            y.backward(case.dy)


def test_adapters_may_share_an_augmented_weight(device: str) -> None:
    first = Case((3, 48), 40, dtype=torch.float32, device=device, has_bias=False)
    second = Case((3, 48), 40, dtype=torch.float32, device=device, has_bias=False)
    weight = AugmentedWeight(first.weight, 8)
    x = first.x.requires_grad_()
    y = lora_linear.lora_linear(x, weight, None, first.lora_a, first.lora_b, SCALING)
    lora_linear.lora_linear(x, weight, None, second.lora_a, second.lora_b, SCALING)
    y.backward(first.dy)
    truth = first.reference(torch.float64)["gradient of x"]
    same_dtype = first.reference(torch.float32)["gradient of x"]
    assert_close_to_truth(x.grad, same_dtype, truth)


def test_quantized_weight(device: str, implementation: str) -> None:
    if implementation == "augmented":
        pytest.skip("it holds a dense weight")

    class Halves:
        shape = (40, 48)
        written = 0

        def write(self, out: torch.Tensor) -> None:
            self.written += 1
            out.copy_(case.weight)

    case = Case((17, 48), 40, dtype=torch.float32, device=device)
    weight = Halves()
    results = case.run(lora_linear.lora_linear, weight=weight)
    # not kept from the forward to the backward
    assert weight.written == 2
    for name, result in case.fused(implementation).items():
        assert torch.equal(results[name], result), name


def test_tables_hold_an_implementation() -> None:
    for table in sorted(path.name for path in launch.TABLES.iterdir()):
        entries = launch._table(table)
        for direction in ("forward", "backward"):
            for entry in entries[f"lora_linear_{direction}"]:
                assert entry["config"]["IMPLEMENTATION"] in ("addmm", "triton")


def _wrong_arguments() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "rank 257", {"lora_a": torch.zeros(257, 48), "lora_b": torch.zeros(40, 257)}
    yield "x: expected", {"x": torch.zeros(3, 47)}
    yield "bias: expected", {"bias": torch.zeros(41)}
    yield "lora_a: expected", {"lora_a": torch.zeros(8, 47)}
    yield "lora_b: expected", {"lora_b": torch.zeros(40, 9)}
    yield "weight: expected", {"x": torch.zeros(3, 48, dtype=torch.float64)}
    yield "none of", {"x": torch.zeros(3, 48, dtype=torch.int64)}
    yield "requires a gradient", {"weight": torch.zeros(40, 48, requires_grad=True)}
    yield "dropout", {"dropout": Dropout(1.0, 0, 0)}
    augmented = AugmentedWeight(torch.zeros(40, 48), 8)
    yield "holds its own", {"weight": augmented}
    yield "rank 4", {
        "weight": augmented, "bias": None,
        "lora_a": torch.zeros(4, 48), "lora_b": torch.zeros(40, 4),
    }  # fmt: skip


@pytest.mark.parametrize(("message", "changes"), list(_wrong_arguments()))
def test_wrong_arguments_are_refused(message: str, changes: dict[str, Any]) -> None:
    arguments = {
        "x": torch.zeros(3, 48), "weight": torch.zeros(40, 48), "bias": torch.zeros(40),
        "lora_a": torch.zeros(8, 48), "lora_b": torch.zeros(40, 8), "scaling": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_linear.lora_linear(**(arguments | changes))
