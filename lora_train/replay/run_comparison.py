"""Two runs side by side: their curves step by step, their weights and checkpoints to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Curve:
    """One metric of two runs, at the steps that both recorded."""

    metric: str
    """Its name in metrics.jsonl."""
    num_steps: int
    """Steps compared."""
    first_step: int | None
    """The first at which the values are not the same to the bit; None: there is none."""
    largest: float
    """Largest absolute difference."""
    largest_step: int | None
    """Where it is."""
    mean: float
    """Mean absolute difference."""
    mean_relative: float
    """`mean` over the mean absolute value of the first run; 0..inf."""

    @property
    def is_same(self) -> bool:
        """Whether all values are the same to the bit."""
        return self.first_step is None


def compare_curves(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> list[Curve]:
    """Compare rows of two metrics.jsonl.

    Args:
        first: rows of one run.
        second: rows of the other.
        metrics: names to compare.

    Returns:
        One curve for each metric of which both have a step.
    """
    curves = []
    for metric in metrics:
        old, new = ({row["step"]: row[metric] for row in rows if metric in row} for rows in (
            first, second,
        ))  # fmt: skip
        steps = sorted(old.keys() & new.keys())
        if not steps:
            continue
        apart = {step: _distance(old[step], new[step]) for step in steps}
        different = [step for step in steps if apart[step]]
        largest = max(different, key=lambda step: apart[step], default=None)
        mean = sum(apart.values()) / len(steps)
        size = sum(abs(old[step]) for step in steps) / len(steps)
        curves.append(
            Curve(
                metric=metric,
                num_steps=len(steps),
                first_step=different[0] if different else None,
                largest=0.0 if largest is None else apart[largest],
                largest_step=largest,
                mean=mean,
                mean_relative=0.0 if mean == 0 else mean / size if size else math.inf,
            )
        )
    return curves


def _distance(old: float, new: float) -> float:
    return 0.0 if old == new else abs(old - new) if math.isfinite(old - new) else math.inf


@dataclass(frozen=True)
class Part:
    """A part of what a run left, compared with that of another."""

    name: str
    """Such as `optimizer state`."""
    difference: str | None
    """The first thing that differs, and by how much; None: the same bits."""


def compare_adapters(first: Path, second: Path) -> str | None:
    """Compare the weights of two adapter folders.

    Args:
        first: folder in PEFT's format.
        second: another.

    Returns:
        What differs, tensor by tensor; None: the same bits.
    """
    from safetensors.torch import load_file

    old, new = (load_file(folder / ADAPTER_FILE) for folder in (first, second))
    return _compare(old, new, "")


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> list[Part]:
    """Compare all that two checkpoints hold, but for how long the training took.

    Args:
        first: a checkpoint.
        second: the one of the same step of another run.

    Returns:
        Adapter, optimizer, learning rate, random numbers, and position in the data.
    """
    old, new = first.read_state(), second.read_state()
    moments = old["optimizer"]["state"], new["optimizer"]["state"]
    settings = old["optimizer"]["param_groups"], new["optimizer"]["param_groups"]
    # what a later version may add belongs to it as well
    shown = {"optimizer", "random", "train_seconds"}
    rest = [{key: state[key] for key in state if key not in shown} for state in (old, new)]
    return [
        Part("adapter", compare_adapters(first.adapter, second.adapter)),
        Part("optimizer state", _compare(*moments, "parameter ")),
        Part("learning rate", _compare(*settings, "group ")),
        Part("random numbers", _compare(old["random"], new["random"], "rank ")),
        Part("step and data", _compare(rest[0], rest[1], "")),
    ]


def _compare(old: Any, new: Any, name: str) -> str | None:
    """The first difference of two nested values, and how many more there are; None: none."""
    found = list(_differences(old, new, name))
    if not found:
        return None
    where, how = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {how}{more}"


def _differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, str]]:
    """Where two nested values differ, in order: name and how."""
    import torch

    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (how := _tensor_difference(old, new)) is not None:
            yield name, how
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        dot = "." if name and not name.endswith(" ") else ""
        for key in dict.fromkeys([*old, *new]):
            if key not in old or key not in new:
                yield f"{name}{dot}{key}", f"only in the {'second' if key not in old else 'first'}"
            else:
                yield from _differences(old[key], new[key], f"{name}{dot}{key}")
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            yield f"{name}number of entries", f"{len(old)} and {len(new)}"
        for number, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from _differences(one, other, f"{name}{number}")
    elif type(old) is not type(new) or old != new:
        yield name, f"{old!r} and {new!r}"


def _tensor_difference(old: Tensor, new: Tensor) -> str | None:
    """How two tensors differ, bit by bit; None: not at all."""
    import torch

    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{tuple(old.shape)} {old.dtype} and {tuple(new.shape)} {new.dtype}"
    # bits, not values: NaN is like itself, and -0 is not like 0
    bits = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (old, new))
    if torch.equal(*bits):
        return None
    apart = (old.double() - new.double()).abs()
    share = f"{int((apart > 0).sum()):,} of {apart.numel():,} values"
    return f"{share}, the largest difference {float(apart.max()):.3g}"
