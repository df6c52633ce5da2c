"""`lora-train preflight`, and the same checks before a run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lora_train.preflight import runner
from lora_train.preflight.findings import Finding
from lora_train.preflight.machine import Machine
from lora_train.preflight.processes import check_batch, check_ranks, check_shm
from lora_train.ranks import Ranks

HEAVY = {"accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "triton"}


def test_all_is_well_on_a_laptop(preflight, workplace):
    for name in ("smollm2-135m-instruct", "us-addresses"):
        (workplace / ".lora_cache/quickstart" / name / "there").mkdir(parents=True)
    found = preflight()
    assert {each["level"] for each in found} == {"ok"}
    assert {tuple(each) for each in found} == {("check", "level", "seen", "why", "mend")}


def test_errors_come_first_and_end_with_status_2(lora_train):
    done = lora_train("preflight", "--factory", "llama31_8b", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stdout.startswith("error: model: meta-llama/Llama-3.1-8B is not in the hub cache")
    assert "lora-train prefetch --factory llama31_8b\n" in done.stdout
    assert "\nok: shm: " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("preflight: 2 errors, ")
    assert done.stderr == ""


def test_a_wrong_command_line_is_refused_as_in_a_run(lora_train):
    done = lora_train("preflight", "peft.dimm=8")
    assert done.returncode == 2
    assert "did you mean `peft.dim`?" in done.stderr


def test_no_heavy_import():
    code = (
        "import sys; from lora_train.cli import main; main(['preflight']); "
        "from lora_train.preflight.runner import is_ready; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_a_run_is_refused_before_anything_is_made(lora_train, workplace):
    words = ("--factory", "llama31_8b", "data.path=chats.jsonl")
    done = lora_train(*words, HF_HUB_OFFLINE="1", SLURM_JOB_ID="7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: gpu: no GPU, and the model has 8.0 B parameters" in done.stderr
    assert "hint: #SBATCH --gpus=1" in done.stderr
    assert "error: data: " in done.stderr
    assert "warning: home: " in done.stderr
    assert "ok: " not in done.stderr
    assert list(workplace.iterdir()) == []
    # the configuration alone is looked at
    assert lora_train(*words, "--dry-run", HF_HUB_OFFLINE="1").returncode == 0


def test_warnings_are_brief_and_the_run_goes_on(monkeypatch, capsys, configured):
    def check(machine, config):
        return [
            Finding("storage", "ok", "fine"),
            Finding("home", "warning", "it is small", "and why", "export HF_HOME=/scratch"),
        ]

    monkeypatch.setattr(runner, "CHECKS", {"home": check})
    assert runner.is_ready(configured(), Machine(), Ranks())
    assert capsys.readouterr().err == (
        "warning: home: it is small\n  hint: export HF_HOME=/scratch\n"
    )


def test_what_a_login_node_lacks_is_no_error(monkeypatch, configured):
    def check(machine, config):
        return [Finding("gpu", "error", "none"), Finding("storage", "error", "full")]

    monkeypatch.setattr(runner, "CHECKS", {"all": check})
    command = Machine(run_follows=False)

    def levels(machine):
        return {each.check: each.level for each in runner.run_checks(machine, configured())}

    assert levels(command) == {"storage": "error", "gpu": "skipped"}
    assert levels(Machine()) == {"storage": "error", "gpu": "error"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert levels(command) == {"storage": "error", "gpu": "error"}


def test_a_finished_run_is_not_checked(monkeypatch, configured, workplace):
    def check(machine, config):
        return [Finding("gpu", "error", "none")]

    monkeypatch.setattr(runner, "CHECKS", {"gpu": check})
    config = configured("trainer.max_steps=20")
    folder = workplace / "runs/quickstart"
    folder.mkdir(parents=True)
    assert not runner.is_ready(config, Machine(), Ranks())
    (folder / "summary.json").write_text('{"steps": 20}')
    assert runner.is_ready(config, Machine(), Ranks())
    assert not runner.is_ready(configured("trainer.max_steps=21"), Machine(), Ranks())
    assert not runner.is_ready(
        configured("trainer.max_steps=20", "resume.mode=never"), Machine(), Ranks()
    )
    (folder / "summary.json").write_text("{")
    assert not runner.is_ready(config, Machine(), Ranks())


def test_one_process_of_a_node_checks_it(monkeypatch, configured):
    def check(machine, config):
        return [Finding("gpu", "error", "none")]

    monkeypatch.setattr(runner, "CHECKS", {"gpu": check})

    def is_ready(**place):
        return runner.is_ready(configured(), Machine(), Ranks(world_size=8, **place))

    assert not is_ready()
    assert not is_ready(global_rank=4, num_to_start=4)  # the second node, before the start
    assert is_ready(global_rank=5, local_rank=1)
    monkeypatch.setenv("LORA_LAUNCHER", "7")  # its parent has looked around
    assert is_ready()


def test_a_check_that_hangs_or_fails_stops_no_run(monkeypatch, machine, configured):
    def hangs(machine, config):
        import time

        time.sleep(60)

    def fails(machine, config):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(runner, "CHECKS", {"hangs": hangs, "fails": fails})
    monkeypatch.setattr(runner, "_SECONDS", 0.2)
    first, second = runner.run_checks(machine, configured())
    assert (first.check, first.level) == ("hangs", "warning")
    assert (second.check, second.level) == ("fails", "skipped")
    assert "ZeroDivisionError: by zero" in second.seen


def test_the_batch_of_a_rehearsal_is_divided_over_the_devices_asked_for(configured, monkeypatch):
    command = Machine(run_follows=False)
    words = ("--factory", "llama31_8b", "trainer.devices=3")
    [finding] = check_batch(command, configured(*words))
    assert finding.level == "error"
    assert finding.mend == "data.global_batch_size=15 or 18"
    [finding] = check_batch(command, configured(*words[:2], "trainer.devices=4"))
    assert finding.seen == (
        "16 sequences a step on 4 processes: micro-batches as the GPU's memory allows"
    )
    # in a run the processes are those that it starts, or that were started
    [finding] = check_batch(Machine(), configured(*words))
    assert finding.level == "error"
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 4), ("MASTER_PORT", 9)):
        monkeypatch.setenv(name, str(value))
    [finding] = check_batch(Machine(), configured(*words[:2]))
    assert finding.seen.endswith("on 4 processes: micro-batches as the GPU's memory allows")
    [finding] = check_batch(Machine(), configured(*words[:2], "data.micro_batch_size=2"))
    assert finding.seen.endswith("on 4 processes: micro-batches of 2, 2 accumulated")


def test_the_shape_of_the_job(configured, monkeypatch):
    assert check_ranks(Machine(), configured())[0].seen == "1 process, 1 here"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name, value in (
        ("JOB_ID", 7), ("STEP_NUM_TASKS", 3), ("STEP_TASKS_PER_NODE", 3), ("GPUS_ON_NODE", 2)
    ):  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    [finding] = check_ranks(Machine(), configured())
    assert finding.level == "error"
    assert "3 tasks on" in finding.seen
    assert "#SBATCH --ntasks-per-node=2" in finding.mend
    assert check_batch(Machine(), configured()) == []
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    [finding] = check_ranks(Machine(), configured("data.global_batch_size=16"))
    assert (finding.level, "srun" in finding.mend) == ("warning", True)


def test_shared_memory(machine, root, configured, monkeypatch):
    assert [each.level for each in check_shm(machine, configured())] == ["ok"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    configured_for_two = configured("data.global_batch_size=2")
    assert [each.level for each in check_shm(machine, configured_for_two)] == ["skipped"]
    (root / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr("lora_train.preflight.processes._SHM_BYTES", 2**60)
    [finding] = check_shm(machine, configured_for_two)
    assert finding.level == "warning"
    assert "--shm-size=8g" in finding.mend


@pytest.mark.parametrize(
    ("variables", "words", "run_follows", "expected"),
    [
        ({}, (), True, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ("data.global_batch_size=2",), True, 2),
        ({}, ("trainer.devices=a100:2",), False, 2),
        ({}, ("trainer.devices=2", "data.global_batch_size=2"), True, 2),
    ],
)
def test_processes_of_a_node(
    machine, configured, monkeypatch, variables, words, run_follows, expected
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine = dataclasses.replace(machine, run_follows=run_follows)
    assert machine.processes_per_node(configured(*words)) == expected
