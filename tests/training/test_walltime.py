"""When the Slurm job ends, and when the run has to save to be done before that."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lora_train.walltime import Walltime, job_end, slurm_job

NOW = 1_795_700_000.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def squeue(folder: Path, script: str) -> dict[str, str]:
    """Variables of a job on a machine whose squeue does what the script says."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:/usr/bin:/bin"}


def end_told(value: str) -> float | None:
    return job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": value}, lambda: NOW)


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lora_train"), "propagate", True)
    caplog.set_level(logging.INFO, "lora_train")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# --- the end of the job -------------------------------------------------------------------------


def test_the_end_is_taken_from_the_environment() -> None:
    assert end_told(str(int(NOW) + 7200)) == NOW + 7200


def test_outside_a_job_nothing_ends() -> None:
    assert job_end({"SLURM_JOB_END_TIME": str(int(NOW) + 7200)}, lambda: NOW) is None


@pytest.mark.parametrize("value", ["NONE", "Unknown", "0", "N/A", str(int(NOW) + 365 * 86400)])
def test_a_job_without_a_limit_has_no_end(value: str, caplog: pytest.LogCaptureFixture) -> None:
    assert end_told(value) is None
    assert warnings(caplog) == []


def test_a_value_that_is_no_number_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert end_told("2026-11-26T18:00:00") is None
    [warning] = warnings(caplog)
    assert "SLURM_JOB_END_TIME" in warning and "'2026-11-26T18:00:00'" in warning


def test_the_end_of_another_job_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert end_told(str(int(NOW) - 3600)) is None
    [warning] = warnings(caplog)
    assert "1:00:00 ago" in warning


def test_squeue_is_asked_where_the_environment_does_not_tell(tmp_path: Path) -> None:
    end = int(NOW) + 600
    asked = f'[ "$*" = "-h -j 7 -o %e" ] && [ "$SLURM_TIME_FORMAT" = %s ] && echo {end}'
    environment = squeue(tmp_path, asked)
    assert job_end(environment, lambda: NOW) == end
    # as a batch script leaves it whose own squeue failed
    assert job_end(environment | {"SLURM_JOB_END_TIME": ""}, lambda: NOW) == end
    told = str(end + 60)
    assert job_end(environment | {"SLURM_JOB_END_TIME": told}, lambda: NOW) == end + 60


@pytest.mark.parametrize("script", ["echo no controller >&2; exit 1", "exec sleep 30", ""])
def test_a_squeue_that_does_not_answer_ends_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_train.walltime._SQUEUE_SECONDS", 0.5)
    assert job_end(squeue(tmp_path, script), lambda: NOW) is None
    assert "nothing tells here when this job ends" in caplog.text
    assert "squeue -h -j $SLURM_JOB_ID -o %e)" in caplog.text


def test_without_squeue_the_line_for_the_batch_script_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert job_end(array | {"PATH": str(tmp_path)}, lambda: NOW) is None
    assert "-j ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID -o %e)" in caplog.text


def test_the_last_task_of_an_array_is_not_named_like_the_array() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm_job(array | {"SLURM_JOB_ID": "7"}) == "7_3"
    # another task; or a job that an array's task submitted, and that inherited its variables
    assert slurm_job(array | {"SLURM_JOB_ID": "9"}) == "9"
    assert slurm_job({}) is None


# --- when to save -------------------------------------------------------------------------------


def test_it_is_due_while_a_step_a_save_and_the_margin_no_longer_fit() -> None:
    clock = Clock()
    walltime = Walltime(NOW + 1000, clock=clock)
    walltime.step_done(30)
    walltime.save_done(10)
    clock.now = NOW + 1000 - (30 + 10 + 60)
    assert not walltime.is_due()
    clock.now += 1
    assert walltime.is_due()


def test_before_the_first_save_a_minute_is_assumed() -> None:
    clock = Clock()
    walltime = Walltime(NOW + 1000, clock=clock)
    walltime.step_done(30)
    clock.now = NOW + 1000 - (30 + 60 + 60) + 1
    assert walltime.is_due()
    walltime.save_done(10)
    assert not walltime.is_due()


def test_the_slowest_save_counts() -> None:
    walltime = Walltime(NOW + 200, clock=Clock())
    walltime.step_done(30)
    walltime.save_done(120)
    walltime.save_done(10)
    assert walltime.is_due()


def test_the_slowest_recent_step_counts_and_an_old_one_does_not() -> None:
    walltime = Walltime(NOW + 180, clock=Clock())
    for seconds in (10, 100, 10):
        walltime.step_done(seconds)
    assert walltime.is_due()
    for _ in range(19):
        walltime.step_done(10)
    assert not walltime.is_due()


def test_the_first_step_with_its_compilation_counts_only_until_the_second() -> None:
    walltime = Walltime(NOW + 300, clock=Clock())
    walltime.step_done(240)
    assert walltime.is_due()
    walltime.step_done(10)
    assert not walltime.is_due()
    walltime.step_done(240)  # the second slow one is no compilation
    assert walltime.is_due()


def test_the_first_step_is_always_tried() -> None:
    walltime = Walltime(NOW + 5, clock=Clock())
    assert not walltime.is_due()
    assert walltime.is_due(next_seconds=1)


def test_other_work_says_how_long_it_takes() -> None:
    walltime = Walltime(NOW + 300, clock=Clock())
    walltime.step_done(1)
    assert not walltime.is_due(next_seconds=100)
    assert walltime.is_due(next_seconds=200)


def test_without_an_end_nothing_is_due(caplog: pytest.LogCaptureFixture) -> None:
    walltime = Walltime(None, clock=Clock())
    walltime.log_start()
    walltime.step_done(1e9)
    assert not walltime.is_due()
    assert not walltime.is_due(next_seconds=1e9)
    assert caplog.text == ""


# --- what it says -------------------------------------------------------------------------------


def test_the_start_says_when_the_job_ends(caplog: pytest.LogCaptureFixture) -> None:
    Walltime(NOW + 7083, clock=Clock()).log_start()
    assert "(in 1:58:03); the run will save and stop in time" in caplog.text
    assert warnings(caplog) == []


def test_a_job_too_short_for_anything_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    Walltime(NOW + 90, clock=Clock()).log_start()
    [warning] = warnings(caplog)
    assert "has 0:01:30 left" in warning and "sbatch --time=" in warning


def test_the_stop_says_what_it_was_decided_by() -> None:
    walltime = Walltime(NOW + 100, clock=Clock())
    walltime.step_done(31)
    walltime.save_done(12)
    text = walltime.describe_stop()
    assert "ends in 0:01:40" in text and "step 0:00:31, checkpoint 0:00:12" in text
