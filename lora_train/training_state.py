"""What a checkpoint holds of a training besides the adapter, and whether processes agree on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_train.data.prepared import PreparedData
from lora_train.errors import RunError
from lora_train.rendezvous import Group


def hash_of_data(data: PreparedData) -> str:
    """Hash the training tokens, labels and packs, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    examples, packs = data.train, data.train_packs
    for array in (
        examples.tokens, examples.supervised, examples.offsets, packs.members, packs.offsets,
    ):  # fmt: skip
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_alike(group: Group, step: int, data_hash: str, parameters: Sequence[Tensor]) -> None:
    """Refuse to go on when processes have other data or other weights than the first.

    Args:
        group: the processes of the run; all of them call it.
        step: steps done.
        data_hash: what `hash_of_data` returned.
        parameters: the trained ones, fp32.

    Raises:
        RunError: they differ; names the processes.
    """
    if group.world_size == 1:
        return
    # sums of integers: exact in any order, and another if any bit is
    sums = torch.stack([each.detach().view(torch.int32).sum() for each in parameters])
    found: list[Any] = group.gather((data_hash, sums.tolist()))
    for number, what, hint in (
        (0, "training data", "data.path must show all nodes the same files"),
        (1, "adapter weights", "the same command goes on from the newest checkpoint"),
    ):
        others = [rank for rank, each in enumerate(found) if each[number] != found[0][number]]
        if others:
            where = ", ".join(f"{rank} on {group.hosts[rank]}" for rank in others)
            raise RunError(
                f"step {step}: rank {where}: other {what} than rank 0 on {group.hosts[0]}",
                hint=hint,
            )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    state: dict[str, Any],
    step: int,
) -> None:
    """Give an optimizer its moments back; its settings stay, and the schedule is at the step.

    Args:
        optimizer: over the same parameters as the one that was saved.
        scheduler: of its learning rates.
        state: its `state_dict`.
        step: steps done.
    """
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    # the schedule is a function of the step
    scheduler.last_epoch = step
    for group, rate, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(step)


def random_state() -> dict[str, Any]:
    """Return the state of the generators that training draws from: torch's, CPU and this GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
