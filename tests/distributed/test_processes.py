"""Processes that `lora-train` starts itself, on CPUs: what they compute, and how they end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Run, expected_members, make_assets, members

PROGRAM = Path(sys.executable).with_name("lora-train")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start `lora-train` with the words of a run, in an environment of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(run: Run, *words: str, **variables: str) -> subprocess.Popen[str]:
        inherited = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "CUDA_"))
        }  # fmt: skip
        run.work.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [PROGRAM, *run.words, *words],
            cwd=run.work,
            env=inherited
            | {"LORA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
            | {"ACCELERATE_USE_CPU": "true"}
            | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def ranks_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """Rank -> number of the process, of those that it has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [each for each in variables if each.startswith(b"RANK=")]
        found |= {each.decode().removeprefix("RANK="): int(child) for each in ranks}
    return found


def wait_for_step(process: subprocess.Popen[str]) -> str:
    """Read until the first step is done; return what was read."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if "step 1/" in line:
            return text
    raise AssertionError(text)


@pytest.mark.slow
def test_two_compute_what_one_does(assets: Path, tmp_path: Path, started: Any) -> None:
    one = Run(assets, tmp_path / "one")
    output, _ = started(one).communicate(timeout=120)
    assert "Initializing distributed" not in output
    two = Run(assets, tmp_path / "two")
    process = started(two, "trainer.devices=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert members(output) == expected_members(2)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_all_and_the_same_line_goes_on(
    number: signal.Signals, assets: Path, tmp_path: Path, started: Any
) -> None:
    run = Run(assets, tmp_path, num_steps=400, changes=("data.global_batch_size=16",))
    process = started(run, "trainer.devices=2")
    wait_for_step(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert f"stopped ({number.name}, " in output


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_is_named(
    assets: Path, tmp_path: Path, started: Any
) -> None:
    run = Run(assets, tmp_path, num_steps=4000)
    process = started(run, "trainer.devices=2")
    wait_for_step(process)
    ranks = ranks_of(process)
    os.kill(ranks["1"], signal.SIGKILL)
    # what the others would wait for by themselves is half an hour
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: rank 1 on {os.uname().nodename} was killed by SIGKILL" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_nodes_with_other_numbers_of_gpus_refuse_together(
    assets: Path, tmp_path: Path, started: Any
) -> None:
    run = Run(assets, tmp_path)
    job = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,other",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    tasks = [
        started(
            run, **job, SLURM_PROCID=str(node), SLURM_NODEID=str(node), SLURM_LOCALID="0",
            SLURM_GPUS_ON_NODE=str(2 - node), CUDA_VISIBLE_DEVICES=("0,1", "0")[node],
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], outputs
    assert "error: the job has other numbers of GPUs on its nodes: 2 on " in outputs[0]
    assert "#SBATCH --gpus-per-node=1" in outputs[0]


@pytest.mark.slow
def test_two_jobs_with_one_port_do_not_mix(assets: Path, tmp_path: Path, started: Any) -> None:
    """A batch script that exports MASTER_PORT, twice on one node."""

    def task(job: int, number: int) -> subprocess.Popen[str]:
        return started(
            Run(assets, tmp_path / str(job), num_steps=4000), SLURM_JOB_ID=str(job),
            SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2",
            SLURM_STEP_NODELIST="localhost", SLURM_PROCID=str(number), SLURM_NODEID="0",
            SLURM_LOCALID=str(number), MASTER_PORT="29417",
        )  # fmt: skip

    first, second = task(71, 0), task(71, 1)
    wait_for_step(first)
    stray = task(72, 1)
    output, _ = stray.communicate(timeout=120)
    assert stray.returncode == 1
    assert "port 29417 on 127.0.0.1 belongs to another run (SLURM_JOB_ID=71" in output
    assert "hint: unset MASTER_PORT" in output
    second.send_signal(signal.SIGTERM)  # they still have each other
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 75, output


@pytest.mark.slow
def test_a_closed_terminal_loses_nothing(assets: Path, tmp_path: Path) -> None:
    run = Run(assets, tmp_path, num_steps=4000)
    variables = {
        "LORA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "TERM": "xterm",
    }  # fmt: skip
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.chdir(tmp_path)
        os.environ.update(variables)
        os.execv(PROGRAM, [str(PROGRAM), *run.words, "trainer.devices=2"])
    seen = b""
    while not run.reached(1):
        seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75, seen.decode()
    assert len(run.checkpoints) == 1
