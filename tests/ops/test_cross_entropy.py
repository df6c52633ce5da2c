from collections.abc import Callable

import pytest
import torch
from truth import assert_norm_close_to_truth

from lora_kernels import cross_entropy
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.reference import reference_linear_cross_entropy

# rows, features, vocabulary; blocks of the kernel hold 8192 columns
SIZES = [(0, 16, 50), (1, 33, 123), (17, 64, 507), (9, 128, 128), (3, 8, 9001), (2, 8, 16384)]

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def problem(device: str, dtype: torch.dtype) -> Callable[..., Problem]:
    """Hidden rows and a head, views of wider matrices, targets and a bias."""

    def make(num_rows: int, num_columns: int, vocabulary: int) -> Problem:
        wide = torch.randn(num_rows, num_columns + 16, dtype=dtype, device=device)
        hidden = wide[:, 8 : 8 + num_columns].requires_grad_()
        wide = torch.randn(vocabulary, num_columns + 16, dtype=dtype, device=device)
        weight = wide.mul_(2 * num_columns**-0.5)[:, :num_columns]
        bias = torch.randn(vocabulary, dtype=dtype, device=device)
        targets = torch.randint(vocabulary, (num_rows,), device=device)
        if num_rows > 1:
            targets[:2] = torch.tensor([0, vocabulary - 1])
        return hidden, weight, targets, bias

    return make


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without being filled is NaN, so it has to be written whole."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def _loss_and_gradient(
    function: Callable[..., torch.Tensor], hidden: torch.Tensor, *head: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = function(hidden, *head)
    # a factor that bf16 does not hold
    (gradient,) = torch.autograd.grad(loss * 0.3, hidden)
    return loss, gradient


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> None:
    loss, gradient = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets, bias)
    again = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets, bias)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
    assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden.detach().to(dtype).requires_grad_()
        head = [weight.to(dtype), targets, None if bias is None else bias.to(dtype)]
        return _loss_and_gradient(reference_linear_cross_entropy, leaf, *head)

    same_dtype, truth = reference(hidden.dtype), reference(torch.float64)
    rounded_logits = 0.0
    if hidden.element_size() == 2 and len(hidden) > 0:
        # what one rounding of every logit may do to the sum: with a few rows, torch's own error is
        # at times none
        logits = hidden.detach().double() @ weight.double().T
        rounded_logits = len(hidden) * torch.finfo(hidden.dtype).eps * logits.abs().max().item()
    error, torchs = ((each - truth[0]).abs().item() for each in (loss, same_dtype[0]))
    slack = 16 * torch.finfo(loss.dtype).eps * (truth[0].abs().item() + 1)
    assert error <= 2 * torchs + rounded_logits + slack
    assert_norm_close_to_truth(gradient, same_dtype[1], truth[1], "gradient")
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, bias), loss)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_columns", "vocabulary"), SIZES)
def test_any_size(
    problem: Callable[..., Problem],
    num_rows: int,
    num_columns: int,
    vocabulary: int,
    has_bias: bool,
) -> None:
    hidden, weight, targets, bias = problem(num_rows, num_columns, vocabulary)
    _check(hidden, weight, targets, bias if has_bias else None)


@pytest.mark.parametrize("chunk_rows", [1, 5, 17])
def test_rows_in_chunks(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *_: chunk_rows)
    _check(*problem(17, 64, 123))


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 1), (100, 100), (1024, 1024), (1025, 640), (2048, 1024), (2049, 768), (8192, 1024)],
)
def test_chunks_are_about_even(num_rows: int, expected: int) -> None:
    assert cross_entropy._chunk_rows(num_rows, 1024) == expected


def test_no_rows(problem: Callable[..., Problem]) -> None:
    hidden, weight, targets, _ = problem(0, 16, 50)
    loss, gradient = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets)
    assert loss.item() == 0
    assert gradient.shape == (0, 16)


def test_large_logits(device: str, dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1e4], [-1e4], [1.0]], dtype=dtype, device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5], [0.0]], dtype=dtype, device=device)
    targets = torch.tensor([0, 0, 2], device=device)
    bias = torch.zeros(4, dtype=dtype, device=device)
    # a class that is ruled out
    bias[3] = float("-inf")
    _check(hidden, weight, targets, bias)


def test_frozen_hidden_states_and_disabled_gradients(problem: Callable[..., Problem]) -> None:
    hidden, weight, targets, _ = problem(5, 16, 50)
    assert not linear_cross_entropy(hidden.detach(), weight, targets).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight.requires_grad_(), targets).requires_grad


@pytest.mark.parametrize("retain_graph", [False, True])
def test_second_backward_is_refused(problem: Callable[..., Problem], retain_graph: bool) -> None:
    loss = linear_cross_entropy(*problem(5, 16, 50))
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradient_goes_on_to_what_made_hidden(problem: Callable[..., Problem]) -> None:
    leaf, weight, targets, bias = problem(5, 16, 50)
    # as a decoder would: the rows with a label, picked from all
    rows = torch.tensor([0, 2, 3], device=leaf.device)
    head = (weight, targets[:3], bias)
    picked = leaf.detach()[rows].requires_grad_()
    _, expected = _loss_and_gradient(linear_cross_entropy, picked, *head)
    _, gradient = _loss_and_gradient(
        lambda hidden, *head: linear_cross_entropy(hidden[rows], *head), leaf, *head
    )
    assert torch.equal(gradient[rows], expected)
    assert (gradient[[1, 4]] == 0).all()


def test_autocast_changes_nothing(problem: Callable[..., Problem]) -> None:
    hidden, *head = problem(5, 16, 50)
    expected = _loss_and_gradient(linear_cross_entropy, hidden, *head)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        actual = _loss_and_gradient(linear_cross_entropy, hidden, *head)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("target", [-100, -1, 50, 2**32 + 3])
def test_impossible_target_is_nan(problem: Callable[..., Problem], target: int) -> None:
    hidden, weight, targets, bias = problem(5, 16, 50)
    _, expected = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets, bias)
    targets[3] = target
    loss, gradient = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets, bias)
    assert loss.isnan()
    assert gradient[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(gradient[others], expected[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_inf_are_seen(problem: Callable[..., Problem], value: float) -> None:
    hidden, weight, targets, bias = problem(5, 16, 50)
    bias[7] = value
    loss, gradient = _loss_and_gradient(linear_cross_entropy, hidden, weight, targets, bias)
    assert loss.isnan()
    assert gradient.isnan().all()


def test_wrong_arguments_are_refused(device: str) -> None:
    hidden = torch.zeros(4, 16, device=device)
    weight = torch.zeros(50, 16, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    bias = torch.zeros(50, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        linear_cross_entropy(hidden.T.contiguous().T, weight, targets)
    with pytest.raises(ValueError, match="weight_VK"):
        linear_cross_entropy(hidden, weight[:, :8], targets)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden, weight.double(), targets)
    with pytest.raises(ValueError, match="targets_T"):
        linear_cross_entropy(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="int32"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="bias_V"):
        linear_cross_entropy(hidden, weight, targets, bias[:49])
    with pytest.raises(ValueError, match="bias_V requires a gradient"):
        linear_cross_entropy(hidden, weight, targets, bias.requires_grad_())
    with pytest.raises(ValueError, match="weight_VK requires a gradient"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)
