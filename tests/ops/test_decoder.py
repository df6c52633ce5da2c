"""The decoder stack against truth: the error of torch's own operations in the same dtype, twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import make_model, make_row
from truth import assert_norm_close_to_truth

from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import Sequences
from lora_kernels.peft_decoder import FusedDecoder
from lora_kernels.reference_decoder import reference_decoder

LENGTHS = (5, 1, 11)


def make_stack(family: str, dtype: torch.dtype, device: str, **options: Any) -> DecoderStack:
    return FusedDecoder(make_model(family, dtype=dtype, device=device, **options)).stack


def make_sequences(stack: DecoderStack, lengths: tuple[int, ...], device: str) -> Sequences:
    row = make_row(lengths, device)
    half = stack.layers[0].head_dim // 2
    frequencies = 100.0 ** (-torch.arange(half, device=device).double() / half)
    angles = row["position_ids"][0, :, None] * frequencies
    dtype = torch.float64 if stack.final_norm.dtype == torch.float64 else torch.float32
    return Sequences(
        angles.cos().to(dtype), angles.sin().to(dtype), row["cu_seq_lens_q"], max(lengths)
    )


def assert_as_true_as_torch(
    stack: DecoderStack, lengths: tuple[int, ...], device: str, *, dropout_seed: int | None = None
) -> None:
    """Output, the gradient of the input and of every A and B, all within the bound."""
    dtype = stack.final_norm.dtype
    sequences = make_sequences(stack, lengths, device)
    num_tokens = sum(lengths)
    rows = torch.arange(0, num_tokens, 2, device=device)
    hidden = torch.randn(num_tokens, stack.final_norm.shape[0], dtype=dtype, device=device)
    d_out = torch.randn(len(rows), hidden.shape[1], dtype=dtype, device=device)

    def gradients(run: Any, at: torch.dtype) -> list[torch.Tensor]:
        inputs = hidden.to(at).requires_grad_()
        out = run(inputs)
        found = torch.autograd.grad(out, [inputs, *stack.parameters], d_out.to(at))
        return [out.detach(), *found]

    def reference(inputs: torch.Tensor) -> torch.Tensor:
        return reference_decoder(
            stack, inputs, sequences, stack.parameters, rows=rows, dropout_seed=dropout_seed
        )

    actual = gradients(
        lambda inputs: stack(inputs, sequences, rows=rows, dropout_seed=dropout_seed), dtype
    )
    same_dtype, truth = gradients(reference, dtype), gradients(reference, torch.float64)
    for number, results in enumerate(zip(actual, same_dtype, truth, strict=True)):
        assert_norm_close_to_truth(*results, f"result {number}")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dropout_seed", [None, 77])
def test_output_and_gradients_are_as_true_as_torchs(family, dropout_seed, dtype, device):
    stack = make_stack(family, dtype, device, lora_dropout=0.2)
    assert_as_true_as_torch(stack, LENGTHS, device, dropout_seed=dropout_seed)


def test_gradcheck_through_the_kernels(device):
    stack = make_stack(
        "qwen3", torch.float64, device, num_layers=1, r=2, target_modules=["q_proj", "down_proj"]
    )
    sequences = make_sequences(stack, (3, 4), device)
    hidden = torch.randn(7, 48, dtype=torch.float64, device=device)

    def run(*parameters: torch.Tensor) -> torch.Tensor:
        for owner, parameter in zip(stack.parameters, parameters, strict=True):
            owner.data.copy_(parameter)
        return stack(hidden, sequences, rows=torch.tensor([1, 5], device=device))

    class Run(torch.autograd.Function):
        """The stack as a function of values: gradcheck hands in copies of the parameters."""

        @staticmethod
        def forward(ctx: Any, *values: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*values)
            return run(*values)

        @staticmethod
        def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            # gradcheck goes back more than once, the stack does not
            with torch.enable_grad():
                out = run(*ctx.saved_tensors)
            return torch.autograd.grad(out, stack.parameters, d_out)

    inputs = tuple(parameter.detach().clone().requires_grad_() for parameter in stack.parameters)
    assert torch.autograd.gradcheck(Run.apply, inputs, fast_mode=True)


def test_memory_that_was_never_written_is_never_read(monkeypatch, device):
    """Every buffer the stack asks for is full of NaN."""
    stack = make_stack("qwen2", torch.float32, device, r=3, lora_dropout=0.2)
    sequences = make_sequences(stack, LENGTHS, device)
    hidden = torch.randn(sum(LENGTHS), 48, device=device)

    def results() -> list[torch.Tensor]:
        out = stack(hidden, sequences, dropout_seed=7)
        return [out, *torch.autograd.grad(out.square().sum(), stack.parameters)]

    def poisoning(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = function(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    expected = results()
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    for actual, plain in zip(results(), expected, strict=True):
        assert torch.equal(actual, plain)


def test_packed_equals_alone(dtype, device):
    stack = make_stack("mistral", dtype, device)
    hidden = torch.randn(sum(LENGTHS), 48, dtype=dtype, device=device)
    packed = stack(hidden, make_sequences(stack, LENGTHS, device))
    alone = stack(hidden[6:], make_sequences(stack, LENGTHS[2:], device))
    # products of other sizes add up in another order
    rounding = 16 * torch.finfo(dtype).eps * alone.abs().max().item()
    torch.testing.assert_close(packed[6:], alone, rtol=0, atol=rounding)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sink_gets_each_layers_gradients_as_autograd_would(checkpointing, device):
    """From the last layer to the first; layer 1 has no adapter."""
    stack = make_stack(
        "qwen2", torch.float32, device, num_layers=3, lora_dropout=0.2, layers_to_transform=[0, 2]
    )
    sequences = make_sequences(stack, LENGTHS, device)
    hidden = torch.randn(sum(LENGTHS), 48, device=device, requires_grad=True)

    def loss() -> torch.Tensor:
        out = stack(hidden, sequences, dropout_seed=7, checkpointing=checkpointing)
        return out.square().sum()

    d_hidden, *expected = torch.autograd.grad(loss(), [hidden, *stack.parameters])
    calls = []
    stack.gradient_sink = lambda *call: calls.append(call)
    loss().backward()
    assert torch.equal(hidden.grad, d_hidden)
    assert all(parameter.grad is None for parameter in stack.parameters)
    assert [len(parameters) for parameters, _ in calls] == [14, 0, 14]
    taken = [pair for call in reversed(calls) for pair in zip(*call, strict=True)]
    for (parameter, gradient), owner, plain in zip(taken, stack.parameters, expected, strict=True):
        assert parameter is owner and torch.equal(gradient, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dropout_seed", [None, 77])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_bound_holds_at_the_shapes_of_llama_31_8b(rank, dropout_seed):
    stack = make_stack(
        "llama-8b", torch.bfloat16, "cuda", num_layers=2, r=rank, lora_dropout=0.1
    )  # fmt: skip
    lengths = (300, 1, 467)
    assert_as_true_as_torch(stack, lengths, "cuda", dropout_seed=dropout_seed)
    hidden = torch.randn(sum(lengths), 4096, dtype=torch.bfloat16, device="cuda")
    sequences = make_sequences(stack, lengths, "cuda")
    runs = []
    for _ in range(2):
        out = stack(hidden, sequences, dropout_seed=dropout_seed)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), stack.parameters)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
