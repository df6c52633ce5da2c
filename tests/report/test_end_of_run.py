"""Real runs end with a report; whatever is wrong with it, the run ends as it would without."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import Run, make_assets

from lora_train.cli import main, parse_command_line
from lora_train.config_loading import resolve
from lora_train.errors import RunError, UserError
from lora_train.report import at_end
from lora_train.report.at_end import EndOfRun
from lora_train.run import _End, run
from lora_train.run_directory import RunDirectory
from lora_train.trainer import Trainer

Train = Callable[..., int]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run directory."""
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def train(
    assets: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Train]:
    """Does a run of 4 steps of the tiny model, and its report."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_REPORT", "on")
    # two threads for so small a model wait for each other more than they compute
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def begin(*changes: str) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [
            *Run(assets, tmp_path, 4, ("log.ckpt.every_n_train_steps=2",), changes).words,
            f"log.log_dir={folder.parent}",
        ]
        config = resolve(overrides=parse_command_line(words).overrides)
        return run(config, argv=["lora-train", *words])

    yield begin
    torch.set_num_threads(threads)


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Have something happen when so many steps are done."""
    train_step = Trainer.train_step

    def changed(self: Trainer) -> Any:
        if self.step == step:
            act()
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", changed)


def kinds(folder: Path) -> list[str]:
    """What the timeline holds, in order."""
    lines = (folder / "timeline.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


def figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command says of a run."""
    capsys.readouterr()
    assert main(["report", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_a_complete_run_and_one_that_is_refused_in_its_place(
    train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    assert "Complete: 4 steps" in (folder / "report.html").read_text()
    assert (folder / "plots" / "loss.png").is_file()
    assert kinds(folder) == ["start", "steps", "checkpoint", "steps", "checkpoint", "end"]
    output, errors = capsys.readouterr()
    # the short version for the job's log, and the page among the next steps
    assert "tiny: Complete: 4 steps" in errors and "goodput" in errors
    assert "report.html" in output.replace("\n", "").replace(" ", "").replace(
        "\N{BOX DRAWINGS LIGHT VERTICAL}", ""
    )

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    with pytest.raises(UserError, match="made with other settings"):
        train("peft.dim=2", "trainer.max_steps=9")
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    assert after == before


def test_a_run_that_fails_twice(
    train: Train, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, and between two checkpoints; then it goes on."""

    def fail() -> None:
        raise RunError("loss <nan>: not finite", hint="a lower optim.lr")

    with monkeypatch.context() as patch:
        before_step(patch, 0, lambda: 1 // 0)
        with pytest.raises(RunError, match="ZeroDivisionError"):
            train()
    page = (folder / "report.html").read_text()
    assert "Failed after 0 of 4 steps" in page and "ZeroDivisionError" in page
    assert "No step was recorded." in page
    with monkeypatch.context() as patch:
        before_step(patch, 3, fail)
        with pytest.raises(RunError, match="not finite"):
            train()
    page = (folder / "report.html").read_text()
    assert "Failed after 3 of 4 steps" in page
    assert "loss &lt;nan&gt;: not finite" in page and "a lower optim.lr" in page
    monkeypatch.setenv("LORA_REPORT", "off")
    assert train() == 0
    assert "Failed after 3 of 4 steps" in (folder / "report.html").read_text()
    found = figures(folder, capsys)
    assert found["state"] == "complete" and found["num_starts"] == 3
    # the third step came after the checkpoint
    assert found["num_lost_steps"] == 1 and found["time_seconds"]["lost"] > 0


def test_a_run_that_is_stopped_and_fails_while_it_is_loaded_again(
    train: Train, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train() == 75
    page = (folder / "report.html").read_text()
    assert "Stopped by SIGTERM" in page and "The same command goes on" in page
    with monkeypatch.context() as patch:
        patch.setattr("lora_train.run.load_base_model", lambda *_: 1 // 0)
        with pytest.raises(RunError, match="ZeroDivisionError"):
            train()
    assert "Failed after 3 of 4 steps" in (folder / "report.html").read_text()
    monkeypatch.setenv("LORA_REPORT", "off")
    assert train() == 0
    found = figures(folder, capsys)
    assert found["state"] == "complete" and found["num_starts"] == 3
    assert found["num_lost_steps"] == 0 and found["steps"] == 4


@pytest.fixture
def ending(sample_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> EndOfRun:
    """The end of a run that has come to train."""
    monkeypatch.setenv("LORA_REPORT", "on")
    end = EndOfRun()
    end.directory = RunDirectory(sample_run("with a blank").folder, None, None)
    end.directory.timeline.started(end.directory.path, 0)
    return end


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise RuntimeError('no fonts here')", "no fonts here"),
        ("import time; time.sleep(600)", "not done in 1 s"),
        ("import os; os.abort()", "status -6"),
    ],
)
def test_a_report_that_fails_is_one_line(
    ending: EndOfRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    problem: str,
) -> None:
    """matplotlib is broken, in the report's process alone."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(at_end, "_SECONDS", 1 if "sleep" in code else 60)
    messages: list[str] = []
    monkeypatch.setattr(at_end.log, "warning", lambda text, *words: messages.append(text % words))
    ending.ended(is_complete=True)
    (line,) = messages
    assert line.startswith("no report") and problem in line
    assert f"`lora-train report '{ending.directory.path}'`" in line


def test_a_terminal_that_is_gone_fails_no_run(
    ending: EndOfRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one of another encoding."""

    class Gone(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone(io.BytesIO(), encoding="latin-1"))
    ending.ended(is_complete=True)
    assert (ending.directory.path / "report.html").is_file()


def test_a_job_that_is_to_be_queued_again_waits_for_no_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slurm may kill it in the meantime, and nothing would go on."""
    did = []
    config = resolve(overrides={"model.path": "m", "data.path": "d"})
    monkeypatch.setattr(EndOfRun, "ended", lambda *_, **__: did.append("report"))
    monkeypatch.setattr("lora_train.run.request_requeue", lambda job: did.append(job) or 75)
    monkeypatch.setattr("lora_train.run._run_together", lambda *_: _End(85, job="4711"))
    assert run(config, argv=["lora-train"]) == 75
    assert did == ["4711"]
