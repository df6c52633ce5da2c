"""Gradients summed over processes: the same numbers as summing each of them after the backward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_train.gradient_sum import GradientSum

NUM_WEIGHTS = 5
# a chunk for each weight of 48 bytes, or for two, or for all
CHUNK_BYTES = (1, 49, 10**6)
ALL = [0, 1, 2, 3, 4]
# of each of two processes the micro-batches, of each the weights in the order of their use: their
# gradients come in the opposite one
CASES: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "three micro-batches": ([ALL] * 3, [ALL] * 3),
    "a weight that one process does not use": ([ALL], [[0, 1, 3, 4]]),
    "a weight that nobody uses": ([[0, 1, 2, 3]], [[0, 1, 2, 3]]),
    "weights used in an earlier micro-batch alone": ([ALL, [0, 4]], [ALL, ALL]),
    "gradients in another order": ([ALL], [[4, 1, 0, 3, 2]]),
    "a process without a micro-batch": ([ALL], []),
}


def loss_of(weights: nn.ParameterList, order: list[int], x: Tensor) -> Tensor:
    return torch.stack([(weights[number] @ x).square().sum() for number in order]).sum()


def make_weights() -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList([torch.randn(3, 4) for _ in range(NUM_WEIGHTS)])


def one_case(rank: int, micro_batches: list[list[int]], chunk_bytes: int) -> list[Any]:
    """Found and expected gradients and numbers that went along, of two steps on this process."""
    weights = make_weights()
    gradient_sum = GradientSum(list(weights), num_extra=2, chunk_bytes=chunk_bytes)
    found = []
    for step in range(2):
        inputs = torch.randn(
            len(micro_batches), 4, generator=torch.Generator().manual_seed(10 * step + rank)
        )
        expected = [torch.zeros(3, 4) for _ in weights]
        gradient_sum.zero()
        for number, (order, x) in enumerate(zip(micro_batches, inputs, strict=True)):
            used = [weights[place] for place in order]
            plain = torch.autograd.grad(loss_of(weights, order, x), used)
            for place, gradient in zip(order, plain, strict=True):
                expected[place] += gradient
            with gradient_sum.overlapping(number == len(micro_batches) - 1):
                loss_of(weights, order, x).backward()
        extra = gradient_sum.finish(torch.tensor([1.0 + rank, step])).clone()
        for gradient in expected:
            dist.all_reduce(gradient)
        found.append([[weight.grad.clone() for weight in weights], expected, extra])
    return found


def order_of_events() -> list[str]:
    """What happens in a step of two micro-batches."""
    weights = make_weights()
    events: list[str] = []
    for number, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, n=number: events.append(f"grad {n}"))
    gradient_sum = GradientSum(list(weights), num_extra=1, chunk_bytes=49)
    all_reduce = dist.all_reduce

    def recording(tensor: Tensor, **options: Any) -> Any:
        events.append(f"sum of {tensor.numel()}")
        return all_reduce(tensor, **options)

    dist.all_reduce = recording
    gradient_sum.zero()
    for is_last in (False, True):
        with gradient_sum.overlapping(is_last):
            loss_of(weights, ALL, torch.ones(4)).backward()
    events.append("finish")
    gradient_sum.finish(torch.zeros(1))
    dist.all_reduce = all_reduce
    return events


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    results: dict[Any, Any] = {
        (name, chunk_bytes): one_case(rank, processes[rank], chunk_bytes)
        for name, processes in CASES.items()
        for chunk_bytes in CHUNK_BYTES
    }
    results["events"] = order_of_events()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_that_of_all_gradients(two_processes: list[dict[Any, Any]], name: str) -> None:
    for chunk_bytes in CHUNK_BYTES:
        ranks = [results[name, chunk_bytes] for results in two_processes]
        for step, (one, other) in enumerate(zip(*ranks, strict=True)):
            for found, expected, extra in (one, other):
                assert extra.tolist() == [3.0, 2.0 * step]
                assert any(gradient.any() for gradient in expected)
                for mine, plain in zip(found, expected, strict=True):
                    assert torch.equal(mine, plain)
            for mine, theirs in zip(one[0], other[0], strict=True):
                assert torch.equal(mine, theirs)


def test_chunks_travel_beside_the_last_backward_pass(two_processes: list[dict[Any, Any]]) -> None:
    gradients = [f"grad {number}" for number in reversed(ALL)]
    for results in two_processes:
        assert results["events"] == [
            *gradients,
            *gradients[:2], "sum of 24", *gradients[2:4], "sum of 24", gradients[4],
            "finish", "sum of 13",
        ]  # fmt: skip


def test_one_process_keeps_autograds_own_gradients() -> None:
    weights = make_weights()
    gradient_sum = GradientSum(list(weights), num_extra=1)
    for _ in range(2):
        gradient_sum.zero()
        assert all(weight.grad is None for weight in weights)
        with gradient_sum.overlapping(True):
            loss_of(weights, [0, 1], torch.ones(4)).backward()
        assert gradient_sum.finish(torch.tensor([2.5])).item() == 2.5
        [expected] = torch.autograd.grad(loss_of(weights, [0], torch.ones(4)), [weights[0]])
        assert torch.equal(weights[0].grad, expected)
        assert not weights[4].grad.any()


@pytest.fixture
def alone_among_two() -> Iterator[None]:
    """A process group of two whose other process adds nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_among_two")
def test_a_gradient_that_left_the_buffer_is_noticed() -> None:
    weights = make_weights()
    gradient_sum = GradientSum(list(weights), num_extra=1)
    gradient_sum.zero()
    torch.optim.SGD(weights).zero_grad()
    with gradient_sum.overlapping(True):
        loss_of(weights, ALL, torch.ones(4)).backward()
    with pytest.raises(AssertionError, match="left the buffer"):
        gradient_sum.finish(torch.zeros(1))


@pytest.mark.usefixtures("alone_among_two")
def test_the_fused_decoder_hands_over_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what autograd accumulates, with a frozen matrix and a module trained in full."""
    from decoder_models import make_model, make_row

    from lora_kernels import decoder as stack_module
    from lora_kernels.peft_decoder import FusedDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model("qwen3", device=device, num_layers=3, modules_to_save=["lm_head"])
    model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.requires_grad_(
        False
    )
    fused = FusedDecoder(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def losses() -> Iterator[Tensor]:
        for lengths in ((4, 1), (5,)):
            row = make_row(lengths, device)
            places = torch.arange(sum(lengths) - 1, device=device)
            yield fused.loss_sum(
                row["input_ids"], row["position_ids"], row["cu_seq_lens_q"], max(lengths),
                places, row["input_ids"][0, 1:],
            )  # fmt: skip

    for loss in losses():
        loss.backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}

    events: list[str] = []

    def recorded(owner: Any, name: str, event: Any) -> None:
        function = getattr(owner, name)

        def recording(*args: Any, **options: Any) -> Any:
            events.append(event(*args))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, recording)

    recorded(stack_module, "layer_backward", lambda layer, *_: f"layer {layer.index}")
    recorded(dist, "all_reduce", lambda tensor: "sum")
    layer_bytes = 4 * sum(p.numel() for name, p in parameters.items() if ".layers.0." in name)
    gradient_sum = GradientSum(
        list(parameters.values()), num_extra=1, decoder=fused.stack, chunk_bytes=layer_bytes
    )
    gradient_sum.zero()
    for number, loss in enumerate(losses()):
        with gradient_sum.overlapping(number == 1):
            loss.backward()
    gradient_sum.finish(torch.zeros(1, device=device))
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, expected[name]), name
    layers = ["layer 2", "layer 1", "layer 0"]
    assert events[:3] == layers
    last_pass = events[3:]
    assert [event for event in last_pass if event != "sum"] == layers
    # when the first layer's turn comes, sums are under way; the last one is left to the end
    assert last_pass.index("sum") < last_pass.index("layer 0")
    assert last_pass[-1] == "sum" and last_pass.count("sum") >= 3


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
