"""N + N = 2N: proven where it holds, and refuted by name where it does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import Run

from lora_train import trainer
from lora_train.cli import main
from lora_train.replay.child_run import ChildEnd
from lora_train.replay.resume_comparison import compare_ends
from lora_train.replay.turns import Turns, follow

CHANGES = ("peft.dropout=0.1", "data.micro_batch_size=auto", "data.validation_size=0.1")


@pytest.fixture
def words(assets: Path, tmp_path: Path) -> list[str]:
    return Run(assets, tmp_path, changes=CHANGES).words


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, run_here: Any) -> None:
    monkeypatch.setattr("lora_train.replay.turns.run_child", run_here)


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runs").glob("verify-resume-*"))


@pytest.mark.usefixtures("in_process")
class TestInProcess:
    def test_the_same_bits(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify-resume", *words, "--steps", "4"]) == 0
        output = capsys.readouterr().out
        assert "against 8 steps without a break" in output
        assert output.count("same bits ") == 14
        assert "verdict: the same bits" in output
        assert not kept(tmp_path)

    def test_a_broken_resume_is_refuted(
        self,
        words: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A program that forgets the random numbers: the dropout draws others."""
        monkeypatch.setattr(trainer, "set_random_state", lambda state: None)
        assert main(["verify-resume", *words]) == 1
        output = capsys.readouterr()
        assert "3 + 3 steps: random numbers: rank 0.cpu: " in output.out
        assert "3 + 3 steps: adapter: base_model.model.model.layers.0." in output.out
        assert "losses and data of steps to 6: step 4: loss" in output.out
        [folder] = kept(tmp_path)
        assert f"the runs and their logs are kept in {folder}" in output.err

    @pytest.mark.parametrize(
        ("broken", "seen"),
        [("moments", "optimizer state: parameter 0"), ("rate", "losses and data of steps to 6:")],
    )
    def test_what_a_resume_may_forget_of_the_optimizer(
        self,
        broken: str,
        seen: str,
        words: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        restore = trainer.restore_optimizer

        def restore_in_part(optimizer: Any, scheduler: Any, state: Any, step: int) -> None:
            if broken == "rate":
                restore(optimizer, scheduler, state, 0)
            else:
                restore(optimizer, scheduler, optimizer.state_dict(), step)

        monkeypatch.setattr(trainer, "restore_optimizer", restore_in_part)
        assert main(["verify-resume", *words]) == 1
        output = capsys.readouterr().out
        assert f"3 + 3 steps: {seen}" in output
        assert "NOT" in output

    def test_the_error_of_the_run_itself(
        self,
        words: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"prompt": "a"}\n')
        words = [word for word in words if not word.startswith("data.path=")]
        assert main(["verify-resume", *words, f"data.path={broken}"]) == 2
        errors = capsys.readouterr().err
        assert str(broken) in errors
        assert "the run `straight` ended with exit status 2" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps: 1 is not at least 2"),
        (["optim.lrr=1"], "did you mean `optim.lr`?"),
        (["--dry-run"], "--dry-run: verify-resume runs what it verifies"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["verify-resume", *words])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_other_tasks_follow_the_main_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []

    def note(words: list[str], **_: Any) -> ChildEnd:
        done.append(words)
        return ChildEnd(0, False, None)

    monkeypatch.setattr("lora_train.replay.turns.run_child", note)
    turns = Turns(tmp_path, is_followed=True)
    turns.run(["first"], tmp_path / "log")
    turns.run(["second"], tmp_path / "log")
    turns.end(1)
    assert follow(tmp_path, tmp_path / "log") == 1
    assert done == [["first"], ["second"]] * 2


def test_another_task_ends_when_the_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when all is well, perhaps before this task has looked."""
    folder = tmp_path / "work"
    folder.mkdir()

    def leave(words: list[str], **_: Any) -> ChildEnd:
        shutil.rmtree(folder, ignore_errors=True)
        return ChildEnd(0, False, None)

    monkeypatch.setattr("lora_train.replay.turns.run_child", lambda *_, **__: None)
    Turns(folder, is_followed=True).run(["one"], tmp_path / "log")
    monkeypatch.setattr("lora_train.replay.turns.run_child", leave)
    assert follow(folder, tmp_path / "log") == 0


# --- what the comparison sees -------------------------------------------------------------------


@pytest.fixture
def two(train: Callable[..., Run], tmp_path: Path) -> tuple[Path, Path]:
    first = train().folder
    second = tmp_path / "runs" / "second"
    shutil.copytree(first, second)
    return first, second


def differences(two: tuple[Path, Path]) -> dict[str, str]:
    parts = compare_ends(*two, num_steps=4, after_step=2)
    return {part.name: part.difference for part in parts if part.difference}


def edit_state(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = run / "checkpoints" / "step-000004" / "state.pt"
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


def test_copies_do_not_differ(two: tuple[Path, Path]) -> None:
    assert differences(two) == {}


def test_one_bit_of_one_weight(two: tuple[Path, Path]) -> None:
    file = two[1] / "checkpoints" / "step-000004" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    value = tensors[name].view(-1)
    value[5] = torch.nextafter(value[5], torch.tensor(9.0))
    save_file(tensors, file)
    found = differences(two)
    assert list(found) == ["adapter"]
    assert found["adapter"].startswith(f"{name}: 1 of ")


def test_a_moment_of_the_optimizer(two: tuple[Path, Path]) -> None:
    edit_state(two[1], lambda state: state["optimizer"]["state"][2]["exp_avg"].add_(0.25))
    found = differences(two)
    assert list(found) == ["optimizer state"]
    assert found["optimizer state"].startswith("parameter 2.exp_avg: ")
    assert found["optimizer state"].endswith("the largest difference 0.25")


def test_the_learning_rate(two: tuple[Path, Path]) -> None:
    def change(state: dict[str, Any]) -> None:
        state["optimizer"]["param_groups"][0]["lr"] = 0.5

    edit_state(two[1], change)
    assert differences(two)["learning rate"].startswith("group 0.lr: ")


def test_random_numbers_and_data(two: tuple[Path, Path]) -> None:
    def change(state: dict[str, Any]) -> None:
        state["random"][0]["cpu"][40] ^= 1
        state["data"] = "other"

    edit_state(two[1], change)
    found = differences(two)
    assert list(found) == ["random numbers", "step and data"]
    assert found["random numbers"].startswith("rank 0.cpu: 1 of ")


@pytest.mark.parametrize(
    ("step", "is_seen"), [(2, False), (3, True)], ids=["before the break", "after it"]
)
def test_the_loss_of_a_step(two: tuple[Path, Path], step: int, is_seen: bool) -> None:
    file = two[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[step - 1]["loss"] += 1e-12
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bool(differences(two)) is is_seen


def test_a_step_that_is_missing(two: tuple[Path, Path]) -> None:
    file = two[1] / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert "steps [3, 4] and [3] were recorded" in str(differences(two))


@pytest.mark.slow
def test_in_processes_of_their_own(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_train", "verify-resume", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "verdict: the same bits" in done.stdout
    assert not kept(tmp_path)
