"""What a Slurm cluster has, read from `sinfo`: nodes with GPUs, their partitions and limits."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_train.errors import UserError

SINFO = ("sinfo", "-h", "-e", "-o", "%P|%G|%f|%D|%m|%c|%l|%a|%T")
"""Partition: GRES, features, nodes, MB and CPUs of a node, limit, availability; nodes' state."""
_NUM_FIELDS = 9
_SECONDS = 10

# Names of GPUs in GRES types and node features. What stands in neither is unknown, and allowed.
# Compute capability 8.0 or newer; it is looked for first: rtx_6000_ada is new, rtx_6000 is not.
_NEW = re.compile(
    r"(?<![a-z0-9])(?:(?:nvidia|rtx)[_-]?)?"
    r"(?:a(?:100|800|10|30|40|[456]000|5500)|g?h(?:100|200|800|20)|l40?s?|g?b[123]00|[345]0[5-9]0"
    r"|ampere|hopper|blackwell|lovelace|\w*ada|rtx[_-]?pro\w*)(?![0-9])"
)
# older ones, and AMD's
_OLD = re.compile(
    r"(?<![a-z0-9])(?:(?:nvidia|tesla|geforce|rtx|gtx)[_-]?)*"
    r"(?:k[248]0m?|m[46]0|p40|p100|v100s?|t4|titan\w*|gtx\w*|1[06][5-8]0|20[678]0|quadro\w*"
    r"|rtx[_-]?[68]000|volta|turing|pascal|maxwell|kepler|mi[123]\d{2}\w*)(?![0-9])"
)
_MIG = re.compile(r"\d+g\.\d+gb")
# a node that Slurm has powered down (powered_down, idle~) starts for a job
_UNUSABLE = re.compile(r"(?:down|drain|fail|maint|inval)")
_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike, and one kind of GPU that they have."""

    partition: str
    is_default: bool
    is_up: bool
    is_usable: bool
    """Whether the nodes run jobs now, or after those that are there: not drained, not down."""
    kind: str | None
    """Type of the GPUs in GRES, None where it is not told: gpu:4."""
    gpus: int
    """GPUs of this kind on each node."""
    all_gpus: int
    """GPUs on each node, of any kind."""
    features: tuple[str, ...]
    nodes: int
    memory_mb: int
    cpus: int
    max_seconds: int | None
    """Time limit of the partition; None: none."""

    @property
    def gpu_feature(self) -> str | None:
        """The feature that names the GPU, or None."""
        named = (each for each in self.features if _NEW.search(each.lower()))
        old = (each for each in self.features if _OLD.search(each.lower()))
        return next(named, None) or next(old, None)

    @property
    def gpu(self) -> str:
        """What the GPU is called, as far as it is known."""
        return self.kind or self.gpu_feature or "unnamed"

    @property
    def is_instance(self) -> bool:
        """Whether these are parts of divided GPUs (MIG)."""
        return _MIG.search(self.gpu.lower()) is not None

    @property
    def age(self) -> Literal["new", "old", "unknown"]:
        """Whether the kernels and bf16 run on this GPU, by its name."""
        for name in (self.kind, self.gpu_feature):
            if name and _NEW.search(name.lower()):
                return "new"
            if name and _OLD.search(name.lower()):
                return "old"
        return "new" if self.is_instance else "unknown"

    def is_kind(self, kind: str) -> bool:
        """Whether a user who asks for this kind means these: a100 means a100_80gb, too."""
        kind = kind.lower()
        if self.kind is not None and self.is_instance:
            return kind == self.kind.lower()  # a100 is no part of one
        return _names(kind, self.kind or "") or bool(self.features_of(kind))

    def features_of(self, kind: str) -> list[str]:
        """The features that name this kind; the one that is the same word comes first."""
        named = (each for each in self.features if _names(kind, each))
        return sorted(named, key=lambda each: each.lower() != kind.lower())


def read_sinfo() -> str | None:
    """Ask Slurm what there is.

    Returns:
        What `sinfo` prints; None where there is no such program, or no answer.
    """
    try:
        done = subprocess.run(SINFO, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def read_cluster(text: str) -> list[NodeGroup]:
    """Read what `sinfo` printed.

    Args:
        text: rows of `SINFO`.

    Returns:
        Groups of nodes with GPUs, one for each kind of GPU.

    Raises:
        UserError: a row is something else.
    """
    groups: list[NodeGroup] = []
    for row in filter(str.strip, text.splitlines()):
        fields = row.strip().split("|")
        try:
            partition, gres, features, nodes, memory, cpus, limit, available, state = fields
            kinds = list(_gpus(gres))
            for kind, count in kinds:
                groups.append(
                    NodeGroup(
                        partition=partition.removesuffix("*"),
                        is_default=partition.endswith("*"),
                        is_up=available == "up",
                        is_usable=_UNUSABLE.match(state.lower()) is None,
                        kind=kind,
                        gpus=count,
                        all_gpus=sum(each for _, each in kinds),
                        features=() if features == "(null)" else tuple(features.split(",")),
                        nodes=int(nodes),
                        # a + stands behind the least of several
                        memory_mb=int(memory.rstrip("+")),
                        cpus=int(cpus.rstrip("+")),
                        max_seconds=_limit(limit),
                    )
                )
        except ValueError:
            raise UserError(
                f"a row of sinfo has not the {_NUM_FIELDS} fields that are expected: {row}",
                hint=f"{' '.join(SINFO[:-1])} '{SINFO[-1]}' prints them",
            ) from None
    return groups


def parse_time(text: str) -> int:
    """Read a time limit as sbatch does.

    Args:
        text: minutes, minutes:seconds, hours:minutes:seconds, or days- and hours, minutes, seconds.

    Returns:
        Seconds.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text} is no time")
    days, *rest = match.groups()
    first, second, third = (int(each or 0) for each in rest)
    if days is not None:
        return int(days) * 86400 + first * 3600 + second * 60 + third
    if rest[2] is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + second


def parse_memory_mb(text: str) -> float:
    """Read memory as sbatch does: MB, or with K, M, G or T; raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if match is None:
        raise ValueError(f"{text} is no memory")
    return int(match[1]) * _UNITS[match[2] or "M"]


def _names(kind: str, name: str) -> bool:
    """Whether a type or feature means a kind of GPU."""
    pattern = rf"(?<![a-z0-9]){re.escape(kind.lower())}(?![0-9])"
    return re.search(pattern, name.lower()) is not None


def _gpus(gres: str) -> Iterator[tuple[str | None, int]]:
    """Yield kind and number from `gpu:a100:4(S:0-1),nvme:1`, `gpu:4`, `(null)`."""
    for each in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = each.split(":")
        if name != "gpu":
            continue
        rest = [word for word in rest if word != "no_consume"]
        count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        if count:
            yield ":".join(rest) or None, count


def _limit(text: str) -> int | None:
    return None if text.lower() in ("infinite", "unlimited", "n/a") else parse_time(text)
