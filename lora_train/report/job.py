"""What the job asked of Slurm and what the run used of it, and the #SBATCH lines that would do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_train.report.formats import UNKNOWN, duration, gibibytes
from lora_train.report.records import Record, Start, gpus_of, number, variables_of

# asked for on top of what was used
_HEAD_ROOM = 1.3
# nobody changes a script for less: of memory, and of cores
_WORTH_GIB = 4.0
_WORTH_CORES = 2
_TIGHT = 0.9
_SHORTEST_LIMIT_SECONDS = 15 * 60


@dataclass(frozen=True)
class Asked:
    """One thing that was asked for."""

    what: str
    asked: str
    used: str
    share: float | None = None
    """Used of asked, from 0."""
    note: str = ""


@dataclass(frozen=True)
class Job:
    """How well the job fitted the run."""

    gpu_hours: float | None
    """Allocated GPUs times the time that the run was up; None without GPUs."""
    num_gpus: int | None
    """Allocated."""
    table: list[Asked] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """What to put into the batch script instead."""
    replaced: list[str] = field(default_factory=list)
    """Options that the job had and that Slurm does not take beside these lines."""


def judge_job(record: Record) -> Job:
    """Compare what was asked for with what was used.

    Args:
        record: of the run.

    Returns:
        The job of the newest start that came to train; without Slurm only GPU-hours.
    """
    start = record.trained
    if start is None:
        return Job(None, None)
    # each start may have been a job of another size
    hours = sum((_gpus(each) or 0) * each.seconds / 3600 for each in record.starts)
    variables = variables_of(start.environment)
    job = Job(hours or None, _gpus(start))
    if "SLURM_JOB_ID" not in variables:
        return job
    _judge_gpus(job, start)
    _judge_gpu_memory(job, record)
    usage = _usage(start)
    if usage:
        _judge_memory(job, variables, usage)
        _judge_cores(job, start, usage)
    _judge_time(job, record, start)
    return job


def _judge_gpus(job: Job, start: Start) -> None:
    allocated, used = job.num_gpus, len(gpus_of(start.environment))
    if not allocated or not used:
        return
    job.table.append(Asked("GPUs", str(allocated), str(used), used / allocated))
    if used < allocated:
        variables = variables_of(start.environment)
        option = "gpus" if "SLURM_GPUS" in variables else "gpus-per-node"
        told = variables.get("SLURM_GPUS") or variables.get("SLURM_GPUS_PER_NODE") or ""
        kind = f"{told.rpartition(':')[0]}:" if ":" in told and "," not in told else ""
        count = used if option == "gpus" else math.ceil(used / _num_nodes(variables))
        job.lines.append(f"#SBATCH --{option}={kind}{count}")


def _judge_gpu_memory(job: Job, record: Record) -> None:
    found = [number(row, "max_memory_allocated_bytes") for row in record.steps]
    peak = max((value for value in found if math.isfinite(value)), default=0.0)
    totals = [number(gpu, "memory_bytes") for gpu in gpus_of(record.environment)]
    if peak and totals:
        total = min(totals)
        note = "the fullest GPU, as torch counts it"
        job.table.append(Asked("GPU memory", gibibytes(total), gibibytes(peak), peak / total, note))


def _judge_memory(job: Job, variables: Mapping[str, str], usage: Mapping[str, float]) -> None:
    peak = usage.get("peak_rss_bytes")
    if not peak:
        return
    note = "sum of the processes' own peaks, on the first node"
    if seen := usage.get("cgroup_peak_bytes"):
        # what processes share, such as a file of weights, is in the sum more than once
        peak = min(peak, seen)
        note += f"; Slurm's cgroup saw {gibibytes(seen)}, with files that the kernel kept in memory"
    asked, option = _asked_memory(variables)
    if asked is None:
        told = "all of the node" if variables.get("SLURM_MEM_PER_NODE") == "0" else UNKNOWN
        job.table.append(Asked("host memory", told, gibibytes(peak), None, note))
        return
    share = peak / asked
    job.table.append(Asked("host memory", gibibytes(asked), gibibytes(peak), share, note))
    fitting = math.ceil(_HEAD_ROOM * peak / 2**30)
    # more than there was cannot have been used: that sum says nothing
    if _TIGHT < share <= 1 or asked / 2**30 - fitting >= _WORTH_GIB:
        job.lines.append(f"#SBATCH --mem={fitting}G")
        job.replaced.extend([option] if option != "--mem" else [])


def _judge_cores(job: Job, start: Start, usage: Mapping[str, float]) -> None:
    variables = variables_of(start.environment)
    asked = _cores(variables)
    if not asked or start.seconds < 1:
        return
    used = usage.get("cpu_seconds", 0.0) / start.seconds
    note = "mean over the newest start, on the first node"
    job.table.append(Asked("CPU cores", str(asked), f"{used:.1f}", used / asked, note))
    tasks = _first_number(variables, "SLURM_TASKS_PER_NODE") or 1
    per_task = max(2, math.ceil(_HEAD_ROOM * used / tasks))
    if asked - per_task * tasks >= _WORTH_CORES * tasks:
        job.lines.append(f"#SBATCH --cpus-per-task={per_task}")
        job.replaced.extend(["--cpus-per-gpu"] if "SLURM_CPUS_PER_GPU" in variables else [])


def _judge_time(job: Job, record: Record, start: Start) -> None:
    variables = variables_of(start.environment)
    end = start.first.facts.get("job_end") or _int(variables, "SLURM_JOB_END_TIME")
    if not isinstance(end, int | float):
        return
    begin = _int(variables, "SLURM_JOB_START_TIME") or start.first.begin
    asked, used = end - begin, start.end - begin
    if asked <= 0 or used <= 0:
        return
    job.table.append(Asked("time", duration(asked), duration(used), used / asked, "newest start"))
    fitting = max(_SHORTEST_LIMIT_SECONDS, _HEAD_ROOM * used)
    # one that was stopped would have used more
    if record.summary is not None and len(record.starts) == 1 and fitting < 0.75 * asked:
        minutes = math.ceil(fitting / 60)
        job.lines.append(f"#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00")


def _usage(start: Start) -> Mapping[str, float]:
    found = start.last.facts.get("usage") if start.last is not None else None
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _asked_memory(variables: Mapping[str, str]) -> tuple[float | None, str]:
    """Bytes of a node, None where they are not told, and the option that asked for them."""
    for name, option, count in (
        ("SLURM_MEM_PER_NODE", "--mem", 1),
        ("SLURM_MEM_PER_CPU", "--mem-per-cpu", _cores(variables)),
        ("SLURM_MEM_PER_GPU", "--mem-per-gpu", _gpus_on_node(variables)),
    ):
        if (mebibytes := _int(variables, name)) and count:
            return mebibytes * count * 2.0**20, option
    return None, ""


def _gpus(start: Start) -> int | None:
    """GPUs of the whole job, as Slurm tells it; at least those that were used."""
    variables = variables_of(start.environment)
    told = _typed_count(variables.get("SLURM_GPUS", ""))
    if told is None:
        told = (_gpus_on_node(variables) or 0) * _num_nodes(variables)
    return max(told, len(gpus_of(start.environment))) or None


def _gpus_on_node(variables: Mapping[str, str]) -> int | None:
    told = _int(variables, "SLURM_GPUS_ON_NODE")
    return told or _typed_count(variables.get("SLURM_GPUS_PER_NODE", ""))


def _typed_count(text: str) -> int | None:
    """What 2, a100:2 and a100:2,h100:1 add up to."""
    counts = [word.rpartition(":")[2] for word in text.split(",")]
    return sum(map(int, counts)) if all(map(str.isdecimal, counts)) else None


def _num_nodes(variables: Mapping[str, str]) -> int:
    return _int(variables, "SLURM_JOB_NUM_NODES") or _int(variables, "SLURM_NNODES") or 1


def _cores(variables: Mapping[str, str]) -> int | None:
    """Of the job on its first node: a step of it may have fewer, which SLURM_CPUS_ON_NODE counts.

    SLURM_JOB_CPUS_PER_NODE is such as 64(x2),32.
    """
    told = _first_number(variables, "SLURM_JOB_CPUS_PER_NODE")
    return told or _int(variables, "SLURM_CPUS_ON_NODE")


def _first_number(variables: Mapping[str, str], name: str) -> int | None:
    found = re.match(r"\d+", variables.get(name, ""))
    return int(found[0]) if found else None


def _int(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else None
