"""Which nodes of a cluster a job gets: partition, kind of GPU, nodes, CPUs and memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lora_train.commands.cluster import NodeGroup, parse_memory_mb
from lora_train.commands.job_request import Request, possible_nodes
from lora_train.errors import UserError

# of a node, for each GPU that is asked for: nodes of 256 GB with 4 GPUs have as much
CPUS_PER_GPU = 8
GIB_PER_GPU = 60
DEFAULT_SECONDS = 2 * 3600
# Slurm and the system keep some of a node's memory, which sinfo may not tell
_MEMORY_SHARE = 0.95
# without a look at the cluster: what most nodes have at most
_LIKELY_GPUS = 8
# 1 MB is what Slurm shows where nobody told it
_LEAST_MEMORY_MB = 1024


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the job asks for."""

    nodes: int
    gpus_per_node: int
    gpus: str
    """The same for sbatch, with the kind where it matters."""
    cpus_per_node: int
    memory_per_node: str | None
    """None: Slurm's default."""
    seconds: int
    partition: str | None
    constraint: str | None
    notes: list[str] = field(default_factory=list)
    """What was decided for the user, or could not be known."""


@dataclass(frozen=True)
class _Pool:
    """The nodes of a partition with one kind of GPU."""

    groups: list[NodeGroup]

    @property
    def first(self) -> NodeGroup:
        return self.groups[0]

    @property
    def most(self) -> int:
        """GPUs of the largest node."""
        return max(group.gpus for group in self.groups)

    def shape(self, gpus: int, nodes: int | None) -> tuple[int, int] | None:
        """The fewest nodes that have as many GPUs each, with their GPUs; None: it cannot be."""
        fewest, all_nodes = -(-gpus // self.most), sum(group.nodes for group in self.groups)
        for count in range(fewest, all_nodes + 1) if nodes is None else [nodes]:
            each, rest = divmod(gpus, count)
            fitting = sum(group.nodes for group in self.groups if group.gpus >= each)
            if each and not rest and fitting >= count:
                return count, each
        return None

    @property
    def tells_memory(self) -> bool:
        """Whether Slurm knows the nodes' memory."""
        return all(group.memory_mb >= _LEAST_MEMORY_MB for group in self.groups)

    def share(self, gpus: int) -> tuple[int, int]:
        """CPUs and GiB for so many GPUs on each of its nodes that have them."""
        fitting = [group for group in self.groups if group.gpus >= gpus]
        cpus = min(group.cpus * gpus // group.all_gpus for group in fitting)
        gib = min(group.memory_mb / 1024 * gpus / group.all_gpus for group in fitting)
        return (
            max(1, min(CPUS_PER_GPU * gpus, cpus)),
            max(1, min(GIB_PER_GPU * gpus, int(_MEMORY_SHARE * gib))),
        )

    def __str__(self) -> str:
        sizes: Counter[int] = Counter()
        for group in self.groups:
            sizes[group.gpus] += group.nodes
        nodes = ", ".join(_on_nodes(sizes[gpus], gpus) for gpus in sorted(sizes, reverse=True))
        return f"{self.first.gpu} in partition {self.first.partition}: {nodes}"


def place(request: Request, groups: Sequence[NodeGroup]) -> Placement:
    """Choose where a job runs.

    Args:
        request: what is asked for.
        groups: the cluster.

    Returns:
        What to ask Slurm for: the default partition where it can be, new GPUs before unknown ones,
        on as few nodes as possible, which are neither down nor drained if it can be.

    Raises:
        UserError: it cannot be on this cluster; the hint says what can.
    """
    usable = [group for group in groups if group.is_usable]
    try:
        return _place(request, usable, groups)
    except UserError:
        if len(usable) == len(groups):
            raise
    placement = _place(request, groups, groups)
    note = "not without nodes that are down or drained now: the job waits for them"
    return replace(placement, notes=[*placement.notes, note])


def _place(
    request: Request, candidates: Sequence[NodeGroup], groups: Sequence[NodeGroup]
) -> Placement:
    """Choose among some nodes of the cluster, and tell them from all others."""
    pools = _pools(possible_nodes(request, candidates))
    found = [(shape, pool) for pool in pools if (shape := pool.shape(request.gpus, request.nodes))]
    if not found:
        raise UserError(
            f"{_count(request.gpus)}"
            + (f" on {request.nodes} nodes" if request.nodes else "")
            + ", as many on each node, cannot be: there are "
            + "; ".join(map(str, pools)),
            hint=_nearest(request, pools),
        )
    (nodes, each), pool = min(
        found,
        key=lambda one: (
            one[1].first.age != "new",
            (one[1].first.max_seconds or DEFAULT_SECONDS) < DEFAULT_SECONDS,  # for debugging
            not one[1].first.is_default,
            one[0][0],
        ),
    )
    first = pool.first
    notes = [
        f"{_count(request.gpus)}: {_on_nodes(nodes, each)}, {first.gpu}, "
        f"in partition {first.partition}"
    ]
    others = dict.fromkeys(other.first.gpu for _, other in found if other.first.gpu != first.gpu)
    if others:
        notes.append("others would do: " + ", ".join(f"--gpus {x}:{request.gpus}" for x in others))
    if first.age == "unknown":
        notes.append(
            f"whether the GPUs ({first.gpu}) have compute capability 8.0 (A100) or newer is not "
            "known here: lora-train refuses older ones"
        )
    prefix, constraint, tells = _selection(request, pool, groups)
    if not tells:
        notes.append(
            f"partition {first.partition} has other GPUs, too, and sinfo names none of them: "
            "--constraint FEATURE chooses the nodes"
        )
    cpus, gib = pool.share(each)
    memory = _memory(request, pool) or (f"{gib}G" if pool.tells_memory else None)
    if memory is None:
        notes.append("sinfo does not tell the nodes' memory: --mem is left to Slurm")
    return Placement(
        nodes=nodes,
        gpus_per_node=each,
        gpus=f"{prefix}{each}",
        cpus_per_node=cpus,
        memory_per_node=memory,
        seconds=_seconds(request, first),
        partition=request.partition or (None if first.is_default else first.partition),
        constraint=constraint,
        notes=notes,
    )


def place_blindly(request: Request) -> Placement:
    """Choose without a look at the cluster.

    Args:
        request: what is asked for.

    Returns:
        One node, or as many as are asked for.

    Raises:
        UserError: the GPUs do not divide over the nodes, or hardly fit into one.
    """
    nodes = request.nodes or 1
    each, rest = divmod(request.gpus, nodes)
    if rest or not each:
        raise UserError(
            f"{_count(request.gpus)} cannot be as many on each of {nodes} nodes",
            hint=f"--gpus {max(each, 1) * nodes} --nodes {nodes}",
        )
    if each > _LIKELY_GPUS and request.nodes is None:
        raise UserError(
            f"{_count(request.gpus)} on one node, and no sinfo here to see what a node has",
            hint=f"--nodes N, such as --nodes {-(-each // 4)} where a node has 4",
        )
    return Placement(
        nodes=nodes,
        gpus_per_node=each,
        gpus=f"{request.kind}:{each}" if request.kind else str(each),
        cpus_per_node=CPUS_PER_GPU * each,
        memory_per_node=request.memory or f"{GIB_PER_GPU * each}G",
        seconds=request.seconds or DEFAULT_SECONDS,
        partition=request.partition,
        constraint=request.constraint,
    )


def _pools(groups: Iterable[NodeGroup]) -> list[_Pool]:
    pools: dict[tuple[str, str | None, str], list[NodeGroup]] = {}
    for group in groups:
        pools.setdefault((group.partition, group.kind, group.gpu), []).append(group)
    return [_Pool(each) for each in pools.values()]


def _selection(
    request: Request, pool: _Pool, groups: Sequence[NodeGroup]
) -> tuple[str, str | None, bool]:
    """Say which GPUs are meant, where the partition has others, too.

    Args:
        request: what is asked for.
        pool: what was chosen.
        groups: the cluster.

    Returns:
        What stands before their number, the constraint, and whether these two tell them apart.
    """
    first, kind, constraint = pool.first, request.kind, request.constraint
    is_word = constraint is None or re.fullmatch(r"[\w.-]+", constraint) is not None
    others = [
        group
        for group in groups
        if group.partition == first.partition
        and (constraint is None or not is_word or constraint in group.features)
        and not (
            group.is_kind(kind) if kind else (group.kind, group.gpu) == (first.kind, first.gpu)
        )
    ]
    prefix = f"{first.kind}:" if first.kind and (others or kind) else ""
    # GPUs that the prefix allows, too
    others = [group for group in others if first.kind in (None, group.kind)]
    if not others and (kind is None or first.kind is not None):
        return prefix, constraint, True
    feature = next(
        (
            each
            for each in [*(first.features_of(kind) if kind else ()), first.gpu_feature]
            if all(each in group.features for group in pool.groups)
            and not any(each in group.features for group in others)
        ),
        None,
    )
    if feature is None or not is_word:
        return prefix, constraint, constraint is not None
    return prefix, feature if constraint in (None, feature) else f"{constraint}&{feature}", True


def _memory(request: Request, pool: _Pool) -> str | None:
    """What the user asks for, if a node has it."""
    if request.memory is None:
        return None
    most = max(group.memory_mb for group in pool.groups)
    if pool.tells_memory and parse_memory_mb(request.memory) > most:
        raise UserError(
            f"--mem={request.memory}: the nodes with {pool.first.gpu} have {most // 1024}G",
            hint=f"--mem={int(_MEMORY_SHARE * most / 1024)}G",
        )
    return request.memory


def _seconds(request: Request, group: NodeGroup) -> int:
    if request.seconds is not None:
        return request.seconds
    return min(DEFAULT_SECONDS, group.max_seconds or DEFAULT_SECONDS)


def _nearest(request: Request, pools: Sequence[_Pool]) -> str:
    """The numbers of GPUs that can be, next to the one that cannot."""

    def can(gpus: int) -> str | None:
        shapes = [shape for pool in pools if (shape := pool.shape(gpus, request.nodes))]
        kind = f"{request.kind}:" if request.kind else ""
        return f"--gpus {kind}{gpus} ({_on_nodes(*min(shapes))})" if shapes else None

    all_gpus = [sum(group.gpus * group.nodes for group in pool.groups) for pool in pools]
    fewer = filter(None, map(can, range(min(request.gpus, max(all_gpus)), 0, -1)))
    more = filter(None, map(can, range(request.gpus + 1, max(all_gpus) + 1)))
    nearest = [each for each in (next(fewer, None), next(more, None)) if each is not None]
    if not nearest:
        most = max(sum(group.nodes for group in pool.groups) for pool in pools)
        return f"--nodes {most}, or fewer"
    return " or ".join(nearest)


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _on_nodes(nodes: int, each: int) -> str:
    return f"1 node with {each}" if nodes == 1 else f"{nodes} nodes with {each} each"
