"""Ranks from every shape of job: the variables are those that Slurm 22.05 and 24.11 set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lora_train import slurm_step
from lora_train.cli import parse_command_line
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.ranks import Ranks, find_ranks
from lora_train.slurm_step import read_step

OURS = ("SLURM_", "CUDA_", "ACCELERATE_", "MASTER_", "LORA_", "OMPI_")
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(OURS) or name in TORCH:
            monkeypatch.delenv(name)


def config(*words: str) -> Config:
    batch = [] if any("batch_size" in word for word in words) else ["data.global_batch_size=8"]
    return parse_command_line([*batch, *words]).resolve()


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this process a task of a step."""

    def task(tasks: str, number: int = 0, local: int = 0, node: int = 0, **more: Any) -> None:
        total = sum(slurm_step._expand(tasks))
        variables = {
            "JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_TASKS": total, "STEP_TASKS_PER_NODE": tasks,
            "PROCID": number, "LOCALID": local, "NODEID": node, "STEP_NODELIST": "a100-[3,5]",
        }  # fmt: skip
        for name, value in (variables | more).items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return task


def ranks(num_devices: int, *words: str) -> Ranks:
    return find_ranks(config(*words), lambda: num_devices)


def place(found: Ranks) -> tuple[int, ...]:
    return (
        found.global_rank, found.world_size, found.local_rank, found.local_world_size,
        found.num_to_start,
    )  # fmt: skip


def refusal(num_devices: int, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        ranks(num_devices, *words)
    return caught.value


class TestAlone:
    def test_a_process_for_each_device(self) -> None:
        assert place(ranks(0)) == place(ranks(1)) == (0, 1, 0, 1, 0)
        assert place(ranks(4)) == (0, 4, 0, 4, 4)

    def test_as_many_as_divide_the_batch(self) -> None:
        assert place(ranks(3)) == (0, 2, 0, 2, 2)
        assert place(ranks(3, "data.global_batch_size=7")) == (0, 1, 0, 1, 0)

    def test_devices_asked_for(self) -> None:
        assert place(ranks(4, "trainer.devices=2")) == (0, 2, 0, 2, 2)
        assert place(ranks(4, "trainer.devices=1")) == (0, 1, 0, 1, 0)
        assert place(ranks(0, "trainer.devices=2")) == (0, 2, 0, 2, 2)  # CPU
        error = refusal(1, "trainer.devices=a100:2")
        assert error.message.startswith("trainer.devices=2, and 1 GPU(s) are visible on ")
        assert error.hint is not None and "#SBATCH --gpus-per-node=2" in error.hint

    def test_more_nodes_without_srun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert refusal(2, "trainer.num_nodes=2").hint is not None
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        # the batch script itself looks like task 0 of 1
        monkeypatch.setenv("SLURM_PROCID", "0")
        found = ranks(2)
        assert place(found) == (0, 2, 0, 2, 2)
        assert found.warning is not None and "srun" in found.warning


class TestTasks:
    """What details differ in: --ntasks, --ntasks-per-node, --gres, typed counts."""

    @pytest.mark.parametrize("more", [{"GPUS_PER_NODE": "2"}, {"GPUS_PER_NODE": "a100:2"}, {}])
    def test_a_task_for_each_device(self, task: Any, more: dict[str, str]) -> None:
        task("2", 1, 1, GPUS_ON_NODE=2, **more)
        found = ranks(2)
        assert place(found) == (1, 2, 1, 2, 0)
        assert (found.host, found.port) == ("127.0.0.1", 10007)

    @pytest.mark.parametrize("more", [{"GPUS_PER_TASK": 1}, {"TRES_PER_TASK": "cpu=4,gres/gpu=1"}])
    def test_gpus_per_task(self, task: Any, more: dict[str, Any]) -> None:
        task("2", 1, 1, GPUS_ON_NODE=2, **more)
        assert place(ranks(1)) == (1, 2, 1, 2, 0)
        # over the nodes as they come
        task("2,1", 2, 0, 1, GPUS_ON_NODE=1, **more)
        assert place(ranks(1)) == (2, 3, 0, 1, 0)

    def test_two_nodes(self, task: Any) -> None:
        task("2(x2)", 3, 1, 1, GPUS_ON_NODE=2)
        found = ranks(2, "trainer.devices=2", "trainer.num_nodes=2")
        assert place(found) == (3, 4, 1, 2, 0)
        assert found.variables() == {
            "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "a100-3", "MASTER_PORT": "10007",
        }  # fmt: skip

    def test_a_task_for_each_node(self, task: Any) -> None:
        task("1", GPUS_ON_NODE=2)
        found = ranks(2)
        assert place(found) == (0, 2, 0, 2, 2)
        assert found.port is None and found.is_alone
        task("1(x2)", 1, 0, 1, GPUS_ON_NODE=4)
        found = ranks(4)
        assert place(found) == (4, 8, 0, 4, 4)
        assert (found.host, found.port, found.is_alone) == ("a100-3", 10007, False)
        assert found.variables(3)["RANK"] == "7"

    def test_all_see_all(self, task: Any) -> None:
        """--gpus-per-task=1 --gpu-bind=none, which some sites advise."""
        task("4", 3, 3, GPUS_ON_NODE=4, GPUS_PER_TASK=1)
        assert place(ranks(4)) == (3, 4, 3, 4, 0)

    def test_world_size_of_a_script(self, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        task("2", 1, 1, GPUS_ON_NODE=2)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert place(ranks(2)) == (1, 2, 1, 2, 0)

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [
            ("v100-1,a100-1", "v100-1"), ("n[03,1]", "n03"), ("gpu[7-9]", "gpu7"),
            ("r[2-3]n[1,4]", "r2n1"),
        ],
    )  # fmt: skip
    def test_the_first_node_is_slurms_first(self, task: Any, nodes: str, first: str) -> None:
        task("2(x2)", 3, 1, 1, GPUS_ON_NODE=2, STEP_NODELIST=nodes)
        assert ranks(2).host == first

    def test_a_shell_of_srun(self, task: Any) -> None:
        task("4", SRUN_COMM_PORT=1, PTY_PORT=2, GPUS_ON_NODE=4)
        assert place(ranks(4)) == (0, 4, 0, 4, 4)

    def test_idle_devices(self, task: Any) -> None:
        task("2", GPUS_ON_NODE=4)
        found = ranks(4)
        assert place(found) == (0, 2, 0, 2, 0)
        assert found.warning is not None and "2 of the job's 4 GPUs" in found.warning

    def test_uneven_tasks(self, task: Any) -> None:
        """Each has a GPU of its own, which is all that it needs."""
        task("3,1", 3, 0, 1, GPUS_ON_NODE=1)
        assert place(ranks(1)) == (3, 4, 0, 1, 0)
        task("2,1", 2, 0, 1, GPUS_ON_NODE=2)
        found = ranks(2)
        assert place(found) == (2, 3, 0, 1, 0)
        assert found.warning is not None and "1 of the job's 2 GPUs" in found.warning

    def test_cpu(self, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        task("2", 1, 1)
        assert place(ranks(0)) == (1, 2, 1, 2, 0)
        task("2", 1, 1, GPUS_ON_NODE=0)
        assert place(ranks(0)) == (1, 2, 1, 2, 0)
        # hidden on purpose
        task("2", 1, 1, GPUS_ON_NODE=2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert place(ranks(0)) == (1, 2, 1, 2, 0)


class TestBadShapes:
    """Every task decides alone, from what all of them know, so that all refuse at once."""

    @pytest.mark.parametrize("number", [0, 2])
    @pytest.mark.parametrize("visible", [1, 2])
    def test_more_tasks_than_devices(self, task: Any, number: int, visible: int) -> None:
        task("3", number, number, GPUS_ON_NODE=2)
        error = refusal(visible)
        assert error.exit_status == 2
        assert error.message.startswith("3 tasks on ") and "has 2 GPU(s)" in error.message
        assert error.hint is not None
        assert error.hint.splitlines()[1:] == [
            "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=2", "#SBATCH --gpus-per-node=2",
        ]  # fmt: skip

    def test_a_node_without_devices(self, task: Any) -> None:
        task("1(x2)", 1, 0, 1, GPUS=1)
        assert "where the job has no GPU" in refusal(0).message

    def test_several_devices_of_its_own(self, task: Any) -> None:
        task("2", GPUS_ON_NODE=4, GPUS_PER_TASK=2)
        assert refusal(2).message.startswith("each task has 2 GPUs of its own")

    def test_several_tasks_that_see_a_part(self, task: Any) -> None:
        task("4", GPUS_ON_NODE=4)
        error = refusal(2)
        assert "the job has 4 GPU(s) and each task sees 2" in error.message
        assert error.hint is not None and "#SBATCH --gpus-per-node=4" in error.hint

    def test_mpirun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        assert refusal(4).message == "mpirun has started 4 of these"

    def test_a_configuration_that_says_otherwise(self, task: Any) -> None:
        task("2", GPUS_ON_NODE=2)
        assert refusal(2, "trainer.devices=4").message.startswith("trainer.devices=4, and 2 ")
        assert "started on 1" in refusal(2, "trainer.num_nodes=2").message

    def test_variables_that_contradict(self, task: Any) -> None:
        task("2", STEP_NUM_TASKS=3)
        assert "contradict each other" in refusal(2).message


class TestTorchrun:
    @pytest.fixture(autouse=True)
    def started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in zip(TORCH, (3, 4, 1, 2), strict=True):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_PORT", "29500")

    def test_its_word_counts(self, task: Any) -> None:
        task("1", GPUS_ON_NODE=4)
        assert place(ranks(4)) == (3, 4, 1, 2, 0)

    def test_half_of_the_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK")
        assert refusal(4).hint == (
            "unset WORLD_SIZE LOCAL_RANK; lora-train starts its processes itself"
        )

    def test_no_port(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_PORT")
        assert "is no port" in refusal(4).message


def test_ports(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of what the kernel gives to outgoing connections; others for other jobs and steps."""
    limits = tmp_path / "ip_local_port_range"
    limits.write_text("10000\t19999\n")
    monkeypatch.setattr(slurm_step, "_EPHEMERAL", limits)
    found = set()
    for job in (5, 6):
        for step in (0, 1):
            task("2", JOB_ID=job, STEP_ID=step)
            here = read_step()
            assert here is not None
            found.add(here.port)
    assert len(found) == 4
    assert all(20000 <= port < 30000 for port in found)


def test_counts_of_tasks() -> None:
    assert slurm_step._expand("2(x3),1") == (2, 2, 2, 1)
    assert slurm_step._expand("4") == (4,)
