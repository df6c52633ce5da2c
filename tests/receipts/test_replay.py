"""Repeating a run: what is refused, what is said, and the verdict."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import Run

from lora_train.cli import main
from lora_train.commands import replay
from lora_train.recorded_run import read_run
from lora_train.replay.child_run import ChildEnd, StepCounter
from lora_train.replay.plan import plan_replay


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch, run_here: Any) -> None:
    monkeypatch.setattr(replay, "run_child", run_here)


def verdict(run: Run, name: str = "tiny-replay") -> dict[str, Any]:
    return json.loads((run.folder.with_name(name) / "replay.json").read_text())


def edit_losses(run: Run, factor: float, from_step: int) -> None:
    file = run.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["step"] >= from_step:
            row["loss"] *= factor
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_gpu(start: dict[str, Any]) -> None:
    start["devices"][0]["name"] = "NVIDIA A100-SXM4-80GB"


def test_the_same_bits(train: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    before = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")}
    assert main(["replay", str(run.folder)]) == 0
    found = verdict(run)
    assert (found["verdict"], found["steps"], found["adapter"]) == (
        "the same bits",
        4,
        "the same bits",
    )
    assert found["expects_same_bits"], found["differences"]
    assert [curve["metric"] for curve in found["curves"]] == ["loss", "grad_norm", "learning_rate"]
    assert all(curve["num_steps"] == 4 for curve in found["curves"])
    assert "verdict: the same bits" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")}
    # a second one takes the next free name
    assert main(["replay", str(run.folder), "--steps", "2"]) == 0
    assert verdict(run, "tiny-replay-2")["steps"] == 2


def test_other_bits_with_nothing_changed_are_a_failure(train: Callable[..., Run]) -> None:
    run = train()
    edit_losses(run, 1 + 1e-12, from_step=3)
    assert main(["replay", str(run.folder)]) == 1
    found = verdict(run)
    assert (found["verdict"], found["curves"][0]["first_step"]) == ("different", 3)


@pytest.mark.parametrize(
    ("factor", "expected", "status"), [(1.005, "the same curve", 0), (1.05, "different", 1)]
)
def test_on_other_hardware_the_curve_counts(
    train: Callable[..., Run],
    factor: float,
    expected: str,
    status: int,
    edit_receipt: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train()
    edit_receipt(run, other_gpu)
    edit_losses(run, factor, from_step=1)
    assert main(["replay", str(run.folder)]) == status
    assert verdict(run)["verdict"] == expected
    assert "device: NVIDIA A100-SXM4-80GB -> " in capsys.readouterr().err


def test_another_seed_gives_another_run(train: Callable[..., Run], edit_receipt: Any) -> None:
    run = train()

    def reseed(start: dict[str, Any]) -> None:
        start["config"]["trainer"]["seed"] = 4

    edit_receipt(run, reseed)
    assert main(["replay", str(run.folder)]) == 1
    found = verdict(run)
    assert (found["verdict"], found["curves"][0]["first_step"]) == ("different", 1)
    assert found["adapter"].startswith("base_model.model.model.layers.0.")
    assert "trainer.seed: 4 -> 1234" in found["notes"][0]


def test_an_edited_config_file_does_not_count(train: Callable[..., Run]) -> None:
    run = train()
    file = run.folder / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["optim"]["lr"] = 1.0
    file.write_text(yaml.safe_dump(tree))
    assert main(["replay", str(run.folder)]) == 0
    assert verdict(run)["verdict"] == "the same bits"


def test_other_tokens_of_the_same_files_stop_it(
    train: Callable[..., Run], edit_receipt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(num_steps=60)

    def other_tokens(start: dict[str, Any]) -> None:
        start["data"]["tokens"] = "0" * 32

    edit_receipt(run, other_tokens)
    assert main(["replay", str(run.folder)]) == 2
    assert "the data gives other tokens than it gave" in capsys.readouterr().err
    assert not (run.folder.with_name("tiny-replay") / "summary.json").exists()


def test_relative_paths_of_a_project_that_moved(
    train: Callable[..., Run], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "a project"
    shutil.copytree(assets, project)
    monkeypatch.chdir(project)
    words = ("data.path=train.jsonl", "model.path=model", "log.log_dir=my runs")
    run = train(*words, "data.micro_batch_size=auto")
    files = json.loads((project / "my runs/tiny/environment.json").read_text())[0]["data"]["files"]
    assert list(files) == ["train.jsonl"]
    moved = project.rename(tmp_path / "moved here")
    monkeypatch.chdir(moved)
    assert main(["replay", "my runs/tiny", "--output", str(tmp_path / "elsewhere" / "again")]) == 0
    found = json.loads((tmp_path / "elsewhere" / "again" / "replay.json").read_text())
    assert (found["verdict"], found["expects_same_bits"]) == ("the same bits", True), run
    # in another folder, the one that the receipt names counts
    edited = json.loads((moved / "my runs/tiny/environment.json").read_text())
    edited[0]["folder"] = str(moved)
    (moved / "my runs/tiny/environment.json").write_text(json.dumps(edited))
    monkeypatch.chdir(tmp_path)
    assert main(["replay", "moved here/my runs/tiny"]) == 0


def test_one_that_is_stopped_compares_what_was_done(
    train: Callable[..., Run], run_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(num_steps=60)
    counter = StepCounter(run.folder.with_name("tiny-replay") / "metrics.jsonl")

    def stop(words: list[str], **_: Any) -> ChildEnd:
        end = run_here(words, should_end=lambda: counter.step() >= 2)
        return ChildEnd(end.status, False, signal.SIGTERM)

    monkeypatch.setattr(replay, "run_child", stop)
    assert main(["replay", str(run.folder)]) == 75
    found = verdict(run)
    assert 2 <= found["steps"] < 60
    assert (found["verdict"], found["adapter"]) == ("the same bits", None)
    assert f"was stopped after {found['steps']} of 60 steps" in found["notes"][-1]


def test_steps_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    counter = StepCounter(file)
    assert counter.step() == 0
    with file.open("w", buffering=1) as stream:
        for text, expected in (
            ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', 1),
            ('ss": 1.5}\n', 2),
            ('{"step": 3, "val_loss": 1.0}\n', 2),
        ):
            stream.write(text)
            stream.flush()
            assert counter.step() == expected


class TestPlan:
    def test_a_run_whose_base_was_exchanged(self, train: Callable[..., Run]) -> None:
        run = train()
        train("optim.lr=1e-2", num_steps=6)
        file = run.folder / "environment.json"
        starts = json.loads(file.read_text())
        starts[0]["config"] = starts[1]["config"]
        starts[1]["base"]["files"]["model.safetensors"]["sha256"] = "0" * 64
        file.write_text(json.dumps(starts))
        plan = plan_replay(read_run(run.folder), None)
        assert (plan.num_steps, plan.is_whole) == (4, False)
        assert "settings changed at step 4 (base model: another model.safetensors)" in plan.notes[0]

    def test_a_first_start_that_was_killed(self, train: Callable[..., Run]) -> None:
        """What the next start hashed is what the first one read: the data is the checkpoint's."""
        run = train()
        train(num_steps=6)
        file = run.folder / "environment.json"
        starts = json.loads(file.read_text())
        starts[0] |= {"hashes": "not hashed", "config": starts[1]["config"]}
        starts[0]["base"]["files"] = starts[0]["data"]["files"] = {}
        file.write_text(json.dumps(starts))
        plan = plan_replay(read_run(run.folder), None)
        assert (plan.num_steps, plan.is_whole, plan.notes) == (6, True, [])
        assert plan.receipt["step"] == 4
        assert plan.receipt["base"]["files"]

    def test_a_run_without_its_adapter(self, train: Callable[..., Run]) -> None:
        run = train()
        shutil.rmtree(run.folder / "adapter")
        assert main(["replay", str(run.folder)]) == 0
        assert (verdict(run)["verdict"], verdict(run)["adapter"]) == ("the same bits", None)

    def test_steps_that_were_not_all_recorded(
        self, train: Callable[..., Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train("trainer.log_every_n_steps=3", num_steps=6)
        assert main(["replay", str(run.folder), "--steps", "5"]) == 0
        assert "The 2 of 5 steps that both recorded gave the same." in capsys.readouterr().out

    def test_a_run_that_was_extended(self, train: Callable[..., Run]) -> None:
        run = train()
        train(num_steps=6)
        plan = plan_replay(read_run(run.folder), None)
        assert (plan.num_steps, plan.is_whole) == (4, False)
        assert plan.config.trainer.max_steps == 4
        [note] = plan.notes
        assert "settings changed at step 4 (trainer.max_steps: 4 -> 6)" in note

    def test_a_run_that_was_stopped(self, train: Callable[..., Run], run_here: Any) -> None:
        run = train()
        for name in ("summary.json", "adapter"):
            path = run.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file = run.folder / "metrics.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
        plan = plan_replay(read_run(run.folder), None)
        assert (plan.num_steps, plan.is_whole, plan.config.trainer.max_steps) == (3, False, 4)
        assert main(["replay", str(run.folder)]) == 0
        assert verdict(run)["verdict"] == "the same bits"
        assert verdict(run)["adapter"] is None

    def test_a_run_without_receipt(self, train: Callable[..., Run]) -> None:
        run = train()
        (run.folder / "environment.json").unlink()
        assert main(["replay", str(run.folder)]) == 0
        found = verdict(run)
        assert (found["verdict"], found["expects_same_bits"]) == ("the same bits", False)
        assert "without a whole receipt" in found["notes"][0]

    def test_more_steps_than_there_are(
        self, train: Callable[..., Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train()
        assert main(["replay", str(run.folder), "--steps", "5"]) == 2
        assert "--steps 5: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_steps_of_a_long_run_in_a_process(train: Callable[..., Run]) -> None:
    run = train(num_steps=100)
    done = subprocess.run(
        [sys.executable, "-m", "lora_train", "replay", str(run.folder), "--steps", "5"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "5 steps gave what they gave the first time" in done.stdout
    replayed = run.folder.with_name("tiny-replay")
    assert not (replayed / "summary.json").exists(), "it was stopped"
