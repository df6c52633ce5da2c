"""A run directory in any condition gives a report that says what is the case."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lora_train.cli import main
from lora_train.report.findings import find_all, to_json
from lora_train.report.page import render
from lora_train.report.terminal import print_report

Make = Callable[..., Any]


def report(folder: Path) -> str:
    """The page of a run; the terminal's version is made as well."""
    found = find_all(folder)
    print_report([found], io.StringIO())
    return render([found])


def test_a_complete_run(sample_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = sample_run()
    assert main(["report", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text()
    assert "Complete: 120 steps" in page
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "time"):
        png = (run.folder / "plots" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000
    assert "No gpu_memory_log*.csv" in page and "singularity run lora.sif" in page
    assert sorted(run.folder.glob(".*")) == []  # nothing half written
    assert f"page: {run.folder}/report.html" in capsys.readouterr().out


def cut_off(run) -> str:
    file = run.folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    return "1 line(s) of metrics.jsonl"


def nan_loss(run) -> str:
    rows = run.read_rows("metrics.jsonl")
    for row in rows[50:60]:
        row["loss"] = math.nan
    run.write_rows("metrics.jsonl", rows)
    assert "NaN" in (run.folder / "metrics.jsonl").read_text()
    return "Complete: 120 steps"


def only_validations(run) -> str:
    rows = [row for row in run.read_rows("metrics.jsonl") if "val_loss" in row]
    run.write_rows("metrics.jsonl", rows)
    return "Training and validation loss"


def no_metrics(run) -> str:
    run.write_rows("metrics.jsonl", [])
    return "No step was recorded."


def nonsense(run) -> str:
    (run.folder / "metrics.jsonl").write_text('[1]\n{"step": "x", "loss": "y"}\n\0\0\n{}\n')
    run.write("environment.json", {"not": "a list"})
    run.write("restarts.json", 7)
    (run.folder / "summary.json").unlink()
    (run.folder / "summary.json").mkdir()
    run.write("eval_a.json", {"results": 7})
    run.write("eval_b.json", {"results": {"adapter": {"intervals": {"loss": None}}}})
    return "2 line(s) of metrics.jsonl"


def no_environment(run) -> str:
    (run.folder / "environment.json").unlink()
    return "No MFU: environment.json is missing."


def only_a_configuration(run) -> str:
    for file in run.folder.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    return "No end was recorded: 0 of 120 steps done"


def no_timeline(run) -> str:
    (run.folder / "timeline.jsonl").unlink()
    run.add_gpu_log()
    return "kept no timeline.jsonl"


@pytest.mark.parametrize(
    "spoil",
    [
        cut_off, nan_loss, only_validations, no_metrics, nonsense, no_environment,
        only_a_configuration, no_timeline,
    ],
)  # fmt: skip
def test_a_spoiled_run(spoil: Callable[..., str], sample_run: Make) -> None:
    run = sample_run()
    expected = spoil(run)
    assert expected in report(run.folder)
    json.dumps(to_json(find_all(run.folder)), allow_nan=False)


def end_with(run, **facts: object) -> None:
    """Let the run have ended otherwise."""
    (run.folder / "summary.json").unlink()
    rows = run.read_rows("timeline.jsonl")
    run.write_rows("timeline.jsonl", [*rows[:-1], {**rows[-1], **facts}])


def test_a_failed_run(sample_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = sample_run()
    end_with(run, reason="failed", message="loss nan <at> step 77", hint="a lower optim.lr")
    page = report(run.folder)
    assert "Failed after 120 of 120 steps" in page
    assert "loss nan &lt;at&gt; step 77" in page and "a lower optim.lr" in page
    assert "<pre>lora-train --factory llama31_8b" in page
    print_report([find_all(run.folder)])
    assert "loss nan <at> step 77" in capsys.readouterr().out


def test_a_complete_run_that_could_not_do_more(sample_run: Make) -> None:
    run = sample_run()
    rows = run.read_rows("timeline.jsonl")
    again = [{**rows[0], "step": 120}, {**rows[-1], "reason": "failed", "message": "no <room>"}]
    run.write_rows("timeline.jsonl", [*rows, *again])
    page = report(run.folder)
    assert "Complete: 120 steps" in page and "A later start failed: no &lt;room&gt;" in page


def test_a_stopped_run(sample_run: Make) -> None:
    run = sample_run()
    end_with(run, reason="SIGTERM")
    state = find_all(run.folder).state
    assert state.kind == "stopped" and "SIGTERM" in state.title
    assert state.command is not None and state.command.startswith("lora-train --factory")
    run.write("restarts.json", [{"reason": "SIGTERM", "requeued": True}])
    state = find_all(run.folder).state
    assert "queued again" in state.text and state.command is None


def test_a_killed_run_and_a_running_one(sample_run: Make) -> None:
    run = sample_run()
    (run.folder / "summary.json").unlink()
    run.write_rows("timeline.jsonl", run.read_rows("timeline.jsonl")[:-1])
    assert find_all(run.folder).state.kind == "lost"
    with FileLock(run.folder / ".lock"):
        assert find_all(run.folder).state.title == "Running: 120 of 120 steps so far"
        assert "still runs" in report(run.folder)


def test_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_where_nothing_can_be_written(
    sample_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said all the same what the run was: the directory may be another user's."""
    run = sample_run()
    (tmp_path / "file").write_text("")
    assert main(["report", str(run.folder), "--output", str(tmp_path / "file" / "below")]) == 2
    output, errors = capsys.readouterr()
    assert "hint: --output DIR" in errors and "mine: Complete: 120 steps" in output


def test_json(sample_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = sample_run("one"), sample_run("two", "optim.lr=1e-5")
    one.add_gpu_log()
    assert main(["report", str(one.folder), str(two.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["one", "two"]
    assert found[0]["state"] == "complete" and found[0]["steps"] == 120
    assert len(found[0]["gpus"]) == 2 and found[1]["gpus"] == []
    assert not (one.folder / "report.html").exists()
