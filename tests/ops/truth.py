"""The bound every kernel is held to: torch's own error in the same dtype, twice."""

import torch

# bf16 products are wrong in Triton's interpreter; on a GPU the narrow types are what is used
DTYPES = (
    [torch.float32, torch.float16, torch.bfloat16]
    if torch.cuda.is_available()
    else [torch.float32, torch.float64]
)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor full of NaN, for outputs that must be written whole."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def strided(
    *shape: int, dtype: torch.dtype, device: str, left: int = 8, right: int = 8
) -> torch.Tensor:
    """Random numbers in a view whose rows are longer than they look; around them is NaN."""
    wide = poisoned(shape[0], left + shape[1] + right, dtype=dtype, device=device)
    view = wide[:, left : left + shape[1]]
    view.copy_(torch.randn(shape, device=device))
    return view


def assert_close_to_truth(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, name: str = "result"
) -> None:
    """max|actual - truth| <= 2 max|same_dtype - truth|, plus what a few roundings of fp32 leave.

    Args:
        actual: what the kernel computed.
        same_dtype: the reference computed in the kernel's dtype.
        truth: the reference computed in fp64.
        name: for the message.
    """
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)} for {tuple(truth.shape)}"
    assert actual.isfinite().all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    allowed = 2 * (same_dtype.double() - truth).abs().max().item()
    # where torch happens to be exact: in fp64 the truth itself is rounded, sum by sum
    epsilon = torch.finfo(actual.dtype).eps
    slack = 16 * epsilon if actual.dtype == torch.float64 else min(4 * epsilon, 2.0**-20)
    allowed += slack * (truth.abs().max().item() + 1)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_norm_close_to_truth(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, name: str = "result"
) -> None:
    """The bound on the norm of the error, for results of many operations.

    The largest of their errors depends on chance, and would ask for more than twice.
    """
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)} for {tuple(truth.shape)}"
    error = (actual.double() - truth).norm().item()
    allowed = 2 * (same_dtype.double() - truth).norm().item()
    epsilon = torch.finfo(actual.dtype).eps
    slack = 64 * epsilon if actual.dtype == torch.float64 else min(epsilon, 2.0**-20)
    allowed += slack * (truth.norm().item() + 1)
    # a comparison with NaN is False
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
