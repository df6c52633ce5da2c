"""What the report counts: time, speed, energy, and what a job asked for and used."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_train.gpu_samples import COLUMNS
from lora_train.report import speed
from lora_train.report.findings import Findings, find_all
from lora_train.report.gpu_log import read_gpu_logs, starved_share
from lora_train.report.plots import make_gpu_plots

Make = Callable[..., Any]
A100 = {"name": "NVIDIA A100-SXM4-80GB", "capability": "8.0"}


@pytest.fixture
def found(sample_run: Make) -> Findings:
    return find_all(sample_run().folder)


def test_time_of_a_run_that_was_killed_and_went_on(found: Findings) -> None:
    """75 steps, a kill with the newest checkpoint at 60, ten minutes in the queue, 60 steps."""
    time = found.time
    assert time is not None
    assert time.num_lost_steps == 15
    assert time.seconds["lost"] == pytest.approx(15 * 2.0)
    assert time.seconds["steps"] == pytest.approx(120 * 2.0)
    assert time.seconds["loading"] == pytest.approx(2 * 40)
    assert time.seconds["waiting"] == pytest.approx(600)
    # after steps 15, 30, 45 and 60, and after 75, 90, 105 and 120
    assert time.seconds["validation"] == pytest.approx(8 * 6)
    assert time.seconds["checkpoint"] == pytest.approx(8 * 2)
    assert sum(time.seconds.values()) == pytest.approx(time.wall_seconds)
    assert time.goodput == pytest.approx(240 / time.wall_seconds)


def test_a_lost_part_of_a_line_of_steps(sample_run: Make) -> None:
    run = sample_run()
    rows = run.read_rows("timeline.jsonl")
    restart = [row for row in rows if row["kind"] == "start"][1]
    restart["step"] = 70
    run.write_rows("timeline.jsonl", rows)
    time = find_all(run.folder).time
    assert time is not None and time.num_lost_steps == 5
    assert time.seconds["lost"] == pytest.approx(5 * 2.0)


def test_mfu_counts_what_lora_needs(found: Findings) -> None:
    """Llama-3.1-8B: counted by hand from its dimensions."""
    frozen = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rank = 8
    adapter = 32 * rank * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    head = 128256 * 4096
    needed = (4 * frozen + 6 * adapter) * 16384 + 4 * head * 9000
    needed -= 2 * 4096 * (4096 + 2 * 1024 + 3 * rank) * 16384  # no gradient of the embedding
    needed += 12 * 32 * 4096 * (16384 * 400)
    recomputed = 2 * frozen * 16384 + 4 * 32 * 4096 * (16384 * 400)
    seconds = np.array([row["step_time_seconds"] for row in found.record.steps])
    is_warm = np.array([row["step"] not in (1, 61) for row in found.record.steps])
    peak = 2 * 312e12
    expected = needed * is_warm.sum() / (seconds[is_warm].sum() * peak)
    assert found.speed.typical(found.speed.mfu) == pytest.approx(expected, rel=1e-6)
    with_recomputed = expected * (needed + recomputed) / needed
    assert found.speed.typical(found.speed.hfu) == pytest.approx(with_recomputed, rel=1e-6)


def test_first_steps_do_not_count_in_the_speed(found: Findings) -> None:
    seconds = [row["step_time_seconds"] for row in found.record.steps]
    warm = [value for value in seconds if value < 9]
    speed = found.speed.typical(found.speed.tokens_per_second)
    assert speed == pytest.approx(16384 * len(warm) / sum(warm))
    assert found.speed.step_percentile(100) == pytest.approx(max(warm))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "CPU (x86_64), 2 threads", "devices": [{"threads": 2}]}, "it ran on a CPU"),
        ({"devices": [A100 | {"name": "NVIDIA Z1"}]}, "the peak of NVIDIA Z1 is not known here"),
        # a seventh of the GPU, with a seventh of its peak
        (
            {"devices": [A100 | {"name": f"{A100['name']} MIG 1g.10gb"}]},
            "the peak of NVIDIA A100",
        ),
        ({"devices": None}, "the GPUs were not recorded"),
        ({"model_config": None}, "the model's config.json was not recorded"),
        ({"model_config": {"model_type": "mamba"}}, "the layers of this model are not known"),
    ],
)
def test_why_there_is_no_mfu(sample_run: Make, change: dict[str, object], reason: str) -> None:
    run = sample_run()
    environment = find_all(run.folder).record.environments
    run.write("environment.json", [environment[0] | change])
    speed = find_all(run.folder).speed
    assert speed.why_no_mfu is not None and speed.why_no_mfu.startswith(reason)
    assert speed.typical(speed.mfu) is None


def test_a_run_that_went_on_with_other_gpus(sample_run: Make) -> None:
    """Two A100 up to step 60, then four H100: each step is a share of what it was done with."""
    run = sample_run()
    (first,) = find_all(run.folder).record.environments
    second = [row for row in run.read_rows("timeline.jsonl") if row["kind"] == "start"][1]
    h100 = A100 | {"name": "NVIDIA H100 80GB HBM3"}
    later = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(second["end"])),
        "step": 60,
        "devices": 4 * [h100],
        "variables": first["variables"] | {"SLURM_GPUS_ON_NODE": "4"},
        "config": {"trainer": {"gradient_checkpointing": False}},
    }
    alone = find_all(run.folder)
    run.write("environment.json", [first, first | later])
    found = find_all(run.folder)
    assert found.speed.peaks_tflops == (2 * 312.0, 4 * 989.0)
    share = found.speed.mfu / alone.speed.mfu
    assert share[:60] == pytest.approx(1) and share[60:] == pytest.approx(2 * 312 / (4 * 989))
    assert (found.speed.hfu[:60] > found.speed.mfu[:60]).all()
    assert (found.speed.hfu[60:] == found.speed.mfu[60:]).all()
    one, two = found.record.starts
    assert found.job.gpu_hours == pytest.approx((2 * one.seconds + 4 * two.seconds) / 3600)


def test_a_newest_start_that_failed_while_it_loaded(sample_run: Make) -> None:
    """It knows nothing of steps and GPUs, which are those of the one before."""
    run = sample_run()
    before = find_all(run.folder)
    rows, end = run.read_rows("timeline.jsonl"), before.record.starts[-1].end
    (run.folder / "summary.json").unlink()
    rows[-1]["reason"] = "SIGTERM"
    failed = [
        {"kind": "start", "begin": end + 60, "end": end + 90, "step": 120},
        {"kind": "end", "begin": end + 90, "end": end + 90, "step": 120, "reason": "failed"},
    ]
    run.write_rows("timeline.jsonl", [*rows, *failed])
    found = find_all(run.folder)
    assert found.state.title == "Failed after 120 of 120 steps"
    assert found.speed.typical(found.speed.mfu) == before.speed.typical(before.speed.mfu)
    assert found.job.table == before.job.table and found.job.lines == before.job.lines
    assert found.job.gpu_hours == pytest.approx(before.job.gpu_hours + 2 * 30 / 3600)


def test_a_complete_run_that_does_more_later_has_not_waited(sample_run: Make) -> None:
    run = sample_run()
    rows = run.read_rows("timeline.jsonl")
    wall = find_all(run.folder).time.wall_seconds
    more = [row | {"begin": row["begin"] + 9e5, "end": row["end"] + 9e5} for row in rows]
    for row in more:
        row["step"] += 120
    run.write_rows("timeline.jsonl", [*rows, *more])
    assert find_all(run.folder).time.wall_seconds == pytest.approx(2 * wall)


def test_a_long_run_is_counted_at_once(sample_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report has half a minute; its marks would hide the curves."""
    run = sample_run()
    run.add_gpu_log()
    calls = []
    count = speed.step_flops
    monkeypatch.setattr(
        speed, "step_flops", lambda *words, **counts: calls.append(1) or count(*words, **counts)
    )
    rows = run.read_rows("timeline.jsonl")
    (validation, *_) = (row for row in rows if row["kind"] == "validation")
    rows[-1:-1] = 100 * [validation]
    run.write_rows("timeline.jsonl", rows)
    found = find_all(run.folder)
    assert 0 < len(calls) < 10
    assert all(not plot.spans and plot.marks for plot in make_gpu_plots(found))


def write_log(file: Path, rows: list[tuple[float, str]]) -> None:
    """Samples of one GPU at some seconds, each with its columns from utilization to reasons."""
    text = ", ".join(COLUMNS) + "\n"
    for seconds, values in rows:
        stamp = f"2026/11/26 12:{int(seconds) // 60:02d}:{seconds % 60:06.3f}"
        text += f"{stamp}, 0, {values}, GPU-1234\n"
    file.write_text(text)


def test_energy_leaves_gaps_out(tmp_path: Path) -> None:
    """300 W for 10 minutes, 20 minutes nothing, 100 W for 5 minutes."""
    busy, idle = "98, 60000, 81920, 300.00, 60, 1410, 0x4", "0, 60000, 81920, 100.00, 40, 210, 0x1"
    rows = [(float(s), busy) for s in range(0, 601, 5)]
    rows += [(float(s), idle) for s in range(1800, 2101, 5)]
    write_log(tmp_path / "gpu_memory_log.csv", rows)
    (gpu,) = read_gpu_logs(tmp_path, UTC)
    kwh, hours = gpu.energy()
    assert kwh == pytest.approx((300 * 600 + 100 * 300) / 3.6e6)
    assert hours == pytest.approx(900 / 3600)
    shares = gpu.throttles()
    assert list(shares) == ["power cap"] and shares["power cap"] == pytest.approx(121 / 182)


def test_a_log_in_a_bad_state(tmp_path: Path) -> None:
    """Not supported values, a second header, lines cut off, also in the last column."""
    file = tmp_path / "gpu_memory_log.csv"
    write_log(file, [(0.0, "[N/A], 100, 200, [N/A], 30, [N/A], [N/A]")])
    line = "2026/11/26 12:00:10.000, 0, 50, 150, 200, 70.5, 31, 1410, 0x0000000000000048, GPU-1234"
    header = ", ".join(COLUMNS)
    file.write_text(f"{file.read_text()}{line[:40]}\n{header}\n{line}\n\0\0{line[:-3]}")
    (gpu,) = read_gpu_logs(tmp_path, UTC)
    assert len(gpu.times) == 2
    assert np.isnan(gpu.values["utilization"][0]) and gpu.values["utilization"][1] == 50
    assert gpu.mean("power") == 70.5 and gpu.most("memory") == 150
    assert set(gpu.throttles()) == {
        "hardware slowdown (heat or power supply)",
        "too hot (hardware)",
    }


def test_gpus_of_several_nodes_and_tasks(sample_run: Make) -> None:
    run = sample_run()
    run.add_gpu_log(2, "gpu_memory_log-node1.csv")
    run.add_gpu_log(1, "gpu_memory_log-node2.csv")
    names = [gpu.name for gpu in find_all(run.folder).gpus]
    assert names == ["node1 GPU 0", "node1 GPU 1", "node2 GPU 0"]


def test_starvation_looks_at_steps_only(tmp_path: Path) -> None:
    busy, idle = "98, 1, 2, 300.00, 60, 1410, 0x0", "10, 1, 2, 100.00, 40, 210, 0x1"
    rows = [(float(s), busy if s < 30 else idle) for s in range(0, 100, 5)]
    write_log(tmp_path / "gpu_memory_log.csv", rows)
    gpus = read_gpu_logs(tmp_path, UTC)
    zero = gpus[0].times[0]
    assert starved_share(gpus, [(zero, zero + 29)]) == 0
    # 3 of 6 busy samples, and 2 idle ones
    assert starved_share(gpus, [(zero + 14, zero + 29), (zero + 58, zero + 66)]) == pytest.approx(
        0.4
    )
    assert starved_share(gpus, [(zero + 1000, zero + 2000)]) is None


def test_asked_and_used(found: Findings) -> None:
    job = found.job
    table = {each.what: each for each in job.table}
    assert (table["host memory"].asked, table["host memory"].used) == ("256G", "31G")
    assert "88G" in table["host memory"].note
    assert table["GPU memory"].share == pytest.approx(62 / 79)
    cores = 2500 / found.record.starts[-1].seconds
    assert table["CPU cores"].share == pytest.approx(cores / 64)
    assert job.gpu_hours == pytest.approx(2 * found.time.up_seconds / 3600)
    assert "#SBATCH --mem=41G" in job.lines  # 1.3 * 31
    assert any(line.startswith("#SBATCH --cpus-per-task=9") for line in job.lines)
    # it was started twice: the time of one job says nothing of the next
    assert not any("--time" in line for line in job.lines)


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({"SLURM_MEM_PER_NODE": None, "SLURM_MEM_PER_CPU": "4096"}, ["#SBATCH --mem=41G"]),
        ({"SLURM_MEM_PER_NODE": None, "SLURM_MEM_PER_GPU": "131072"}, ["#SBATCH --mem=41G"]),
        # a step of the job has fewer cores than the job
        (
            {
                "SLURM_MEM_PER_NODE": None,
                "SLURM_MEM_PER_CPU": "4096",
                "SLURM_CPUS_ON_NODE": "2",
                "SLURM_JOB_CPUS_PER_NODE": "64(x2)",
            },
            ["#SBATCH --mem=41G"],
        ),
        # all of the node
        ({"SLURM_MEM_PER_NODE": "0"}, []),
        # less than the sum of the processes: they share pages
        ({"SLURM_MEM_PER_NODE": str(24 * 1024)}, []),
        ({"SLURM_GPUS": "a100:4"}, ["#SBATCH --gpus=a100:2", "#SBATCH --mem=41G"]),
        (
            {"SLURM_GPUS_ON_NODE": None, "SLURM_GPUS_PER_NODE": "a100:3"},
            ["#SBATCH --gpus-per-node=a100:2", "#SBATCH --mem=41G"],
        ),
        ({"SLURM_MEM_PER_NODE": str(44 * 1024)}, []),
        # it was close to the end
        ({"SLURM_MEM_PER_NODE": str(33 * 1024)}, ["#SBATCH --mem=41G"]),
        ({"SLURM_GPUS_ON_NODE": "4"}, ["#SBATCH --gpus-per-node=2", "#SBATCH --mem=41G"]),
        ({"SLURM_GPUS_ON_NODE": None, "SLURM_GPUS_PER_NODE": "a100:2"}, ["#SBATCH --mem=41G"]),
    ],
)
def test_lines_for_the_batch_script(
    sample_run: Make, variables: dict[str, str | None], lines: list[str]
) -> None:
    run = sample_run()
    environment = find_all(run.folder).record.environment
    changed = environment["variables"] | variables
    changed = {name: value for name, value in changed.items() if value is not None}
    run.write("environment.json", [environment | {"variables": changed}])
    job = find_all(run.folder).job
    assert [line for line in job.lines if "cpus" not in line] == lines
    if variables.get("SLURM_MEM_PER_NODE", "") is None:
        (asked,) = (each for each in job.table if each.what == "host memory")
        assert asked.asked == "256G"
        assert job.replaced in (["--mem-per-cpu"], ["--mem-per-gpu"])


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"SLURM_GPUS": "3", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "2"}, 3),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:1", "SLURM_JOB_NUM_NODES": "2"}, 6),
        ({}, 2),
    ],
)
def test_gpus_of_a_job(sample_run: Make, variables: dict[str, str], count: int) -> None:
    run = sample_run()
    environment = find_all(run.folder).record.environment
    run.write("environment.json", [environment | {"variables": variables}])
    assert find_all(run.folder).job.num_gpus == count


def test_memory_that_processes_share_counts_once(sample_run: Make) -> None:
    """Eight processes that each map the same weights: Slurm's cgroup knows."""
    run = sample_run()
    rows = run.read_rows("timeline.jsonl")
    rows[-1]["usage"] |= {"peak_rss_bytes": 300 << 30, "cgroup_peak_bytes": 50 << 30}
    run.write_rows("timeline.jsonl", rows)
    (asked,) = (each for each in find_all(run.folder).job.table if each.what == "host memory")
    assert (asked.asked, asked.used) == ("256G", "50G")


def test_a_time_limit_that_was_too_long(sample_run: Make) -> None:
    run = sample_run()
    rows = run.read_rows("timeline.jsonl")
    second = max(n for n, row in enumerate(rows) if row["kind"] == "start")
    run.write_rows("timeline.jsonl", [*rows[:second], {**rows[-1], "end": rows[0]["begin"] + 3600}])
    # an hour and 5 s of 4 h: 1.3 times that is 78 min and 6.5 s
    assert "#SBATCH --time=1:19:00" in find_all(run.folder).job.lines


def test_without_slurm(sample_run: Make) -> None:
    run = sample_run()
    environment = find_all(run.folder).record.environment
    run.write("environment.json", [environment | {"variables": {}}])
    job = find_all(run.folder).job
    assert job.table == [] and job.lines == []
    assert job.gpu_hours is not None and job.num_gpus == 2
