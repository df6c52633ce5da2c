"""What the user asks of a cluster, and which of its nodes can be meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_train.commands.cluster import NodeGroup
from lora_train.commands.job_script import format_time
from lora_train.errors import UserError

_NO_NEW_GPU = "slowly, an old GPU does: trainer.precision=fp32 kernels.fused=off behind the --"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for; None: whatever fits."""

    gpus: int = 1
    """Of the whole job."""
    kind: str | None = None
    nodes: int | None = None
    seconds: int | None = None
    partition: str | None = None
    constraint: str | None = None
    memory: str | None = None
    """Of each node."""
    takes_old: bool = False
    """Whether the run goes without bf16 and kernels."""


def possible_nodes(request: Request, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """Find the nodes that can be meant.

    Args:
        request: what is asked for.
        groups: the cluster.

    Returns:
        Those that satisfy each wish by itself; whether their number is enough is left open.

    Raises:
        UserError: a wish leaves none; the hint names what there is.
    """
    if not groups:
        raise UserError(
            "sinfo shows no GPU on this cluster", hint="log in to a cluster that has some"
        )
    partitions = ", ".join(dict.fromkeys(group.partition for group in groups if group.is_up))
    left = _keep(
        groups,
        lambda group: request.partition in (None, group.partition),
        f"partition {request.partition} has no GPUs, or is not on this cluster",
        f"--partition NAME, of {partitions}",
    )
    left = _keep(
        left,
        lambda group: group.is_up,
        f"partition {request.partition} is not up" if request.partition else "no partition is up",
        f"--partition NAME, of {partitions}" if partitions else "`sinfo` shows when one is",
    )
    feature = request.constraint
    # an expression such as a100|h100 is Slurm's to judge
    if feature is not None and re.fullmatch(r"[\w.-]+", feature):
        known = ", ".join(dict.fromkeys(one for group in left for one in group.features))
        left = _keep(
            left,
            lambda group: feature in group.features,
            f"no node with GPUs has the feature {feature}",
            f"--constraint NAME, of {known}" if known else "leave --constraint out",
        )
    kind = request.kind
    kinds = dict.fromkeys(group.gpu for group in left if group.age != "old")
    if kind is not None:
        left = _keep(
            left,
            lambda group: group.is_kind(kind),
            f"there is no GPU {kind} here",
            f"--gpus {next(iter(kinds))}:{request.gpus}" if kinds else _NO_NEW_GPU,
        )
    if not request.takes_old:
        new = [group for group in groups if group.is_up and group.age == "new"]
        left = _keep(
            left,
            lambda group: group.age != "old",
            f"{left[0].gpu}: the kernels and bf16 need compute capability 8.0 (A100) or newer",
            f"--gpus {new[0].gpu}:{request.gpus} --partition {new[0].partition}"
            if new
            else _NO_NEW_GPU,
        )
    if kind is None:
        left = _keep(
            left,
            lambda group: not group.is_instance,
            "there are only parts of divided GPUs (MIG)",
            f"--gpus {left[0].gpu}:1",
        )
    elif request.gpus > 1 and left[0].is_instance:
        raise UserError(
            f"{request.gpus} parts of divided GPUs (MIG): they cannot work on one run together",
            hint=f"--gpus {left[0].gpu}:1",
        )
    longest = max(left, key=_limit)
    asked = request.seconds or 0
    return _keep(
        left,
        lambda group: asked <= _limit(group),
        f"--time={format_time(asked)} is longer than partition {longest.partition} allows",
        f"--time={format_time(longest.max_seconds or asked)}; with --requeue the job goes on after "
        "it by itself",
    )


def _limit(group: NodeGroup) -> float:
    return float("inf") if group.max_seconds is None else group.max_seconds


def _keep(
    groups: Sequence[NodeGroup], is_kept: Callable[[NodeGroup], bool], problem: str, hint: str
) -> list[NodeGroup]:
    kept = [group for group in groups if is_kept(group)]
    if not kept:
        raise UserError(problem, hint=hint)
    return kept
