"""The job queued again: when a run may ask, what it records, and how it takes Slurm's answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lora_train import exit_status
from lora_train.requeue import TIME_LIMIT, Restarts, job_to_requeue, request_requeue, stays_ended
from lora_train.run_directory import RunDirectory

JOB = {"SLURM_JOB_ID": "7"}


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lora_train"), "propagate", True)
    caplog.set_level(logging.INFO, "lora_train")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, None, None)


def start(directory: RunDirectory, step: int, environment: dict[str, str] = JOB) -> Restarts:
    restarts = Restarts(directory, environment)
    restarts.started(step)
    return restarts


def one_start(directory: RunDirectory, first: int, last: int, reason: str = TIME_LIMIT) -> bool:
    """A whole start of the run, from step to step; whether it asked to be queued again."""
    restarts = start(directory, first)
    requeued, _ = restarts.may_requeue(last, reason)
    restarts.ended(last, reason, requeued)
    return requeued


# --- the record ---------------------------------------------------------------------------------


def test_every_start_is_recorded(directory: RunDirectory) -> None:
    one_start(directory, 0, 40)
    restarts = start(directory, 40, JOB | {"SLURM_RESTART_COUNT": "1"})
    first, second = directory.read_json("restarts.json")
    assert (first["job"], first["restart_count"], first["host"] != "") == ("7", 0, True)
    assert (first["first_step"], first["last_step"]) == (0, 40)
    assert (first["reason"], first["requeued"]) == ("time limit", True)
    assert (second["restart_count"], second["first_step"], second["last_step"]) == (1, 40, None)
    assert restarts.num_restarts == 1
    assert Restarts(directory, JOB).num_restarts == 1


def test_the_first_start_is_no_restart(directory: RunDirectory) -> None:
    assert Restarts(directory, JOB).num_restarts == 0
    assert start(directory, 0).num_restarts == 0


def test_a_killed_start_came_as_far_as_its_checkpoint(directory: RunDirectory) -> None:
    start(directory, 0)
    start(directory, 50)
    killed = directory.read_json("restarts.json")[0]
    assert (killed["last_step"], killed["reason"], killed["requeued"]) == (
        50,
        "failed or killed",
        False,
    )


@pytest.mark.parametrize(
    "content", [b'[{"job": "7", ', b"[1, 2]", b'[{"job": "7"}]', b'{"a": 1}', b"\xff\xfe", b"3"]
)
def test_a_damaged_record_ends_no_run(
    content: bytes, directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    file = directory.path / "restarts.json"
    file.write_bytes(content)
    restarts = start(directory, 10)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(file) in warning and "begins anew" in warning
    assert restarts.num_restarts == 0
    assert restarts.may_requeue(10, TIME_LIMIT)[0]
    assert len(json.loads(file.read_text())) == 1


def test_a_record_that_cannot_be_written_ends_no_run(
    directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    (directory.path / ".restarts.json").mkdir()
    restarts = start(directory, 0)
    restarts.ended(5, TIME_LIMIT, True)
    assert "cannot write" in caplog.text


# --- who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [TIME_LIMIT, "SIGTERM", "SIGUSR1"])
def test_a_stopped_run_asks(reason: str, directory: RunDirectory) -> None:
    assert one_start(directory, 0, 40, reason)


def test_ctrl_c_does_not_ask(directory: RunDirectory) -> None:
    may, why = start(directory, 0).may_requeue(40, "SIGINT")
    assert not may
    assert "Ctrl-C" in why


def test_two_starts_in_a_row_without_a_step_are_the_last(directory: RunDirectory) -> None:
    assert one_start(directory, 0, 40)
    assert one_start(directory, 40, 40)
    may, why = start(directory, 40).may_requeue(40, TIME_LIMIT)
    assert not may
    assert "two starts in a row of job 7" in why and "step 40" in why
    for remedy in ("--time", "eval.num_generate=0", "log.ckpt.every_n_train_steps=10"):
        assert remedy in why


def test_a_step_in_between_makes_a_new_try(directory: RunDirectory) -> None:
    assert one_start(directory, 0, 0)
    assert one_start(directory, 0, 1)
    assert one_start(directory, 1, 1)


def test_a_killed_start_without_a_checkpoint_counts(directory: RunDirectory) -> None:
    start(directory, 0)
    assert not one_start(directory, 0, 0)


def test_a_killed_start_with_a_checkpoint_made_progress(directory: RunDirectory) -> None:
    start(directory, 0)
    assert one_start(directory, 50, 50)


def test_another_job_is_another_try(directory: RunDirectory) -> None:
    one_start(directory, 0, 0)
    restarts = start(directory, 0, {"SLURM_JOB_ID": "8"})
    assert restarts.may_requeue(0, TIME_LIMIT)[0]


def test_outside_a_job_nothing_is_queued(caplog: pytest.LogCaptureFixture) -> None:
    assert job_to_requeue({}) is None
    assert "resume.requeue=true has no effect" in caplog.text


# --- Slurm's answer -----------------------------------------------------------------------------


class Scontrol:
    """A scontrol on PATH that shows a job in some state and takes a requeue or refuses it."""

    def __init__(self, folder: Path) -> None:
        self.program, self.calls = folder / "scontrol", folder / "calls"

    def answers(self, shown: str, requeue: str = "exit 0") -> None:
        self.program.write_text(
            f'#!/bin/sh\necho "$*" >>{self.calls}\n'
            f"case $1 in show) cat <<'END'\nJobId=7 JobName=JobState=x\n   {shown}\nEND\n"
            f";; requeue) {requeue} ;; esac\n"
        )
        self.program.chmod(0o755)

    def asked(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith("requeue")]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Scontrol(tmp_path)


@pytest.mark.parametrize(
    "shown",
    [
        "JobState=RUNNING Reason=None Dependency=(null)\n   PreemptTime=None",
        "JobState=COMPLETING Reason=TimeLimit Dependency=(null)\n   PreemptTime=None",
        "JobState=COMPLETING Reason=None Dependency=(null)\n   PreemptTime=2026-11-26T15:43:18",
    ],
    ids=["running", "time limit", "preempted"],
)
def test_slurm_is_asked(shown: str, scontrol: Scontrol) -> None:
    scontrol.answers(shown)
    assert not stays_ended("7_3")
    assert request_requeue("7_3") == exit_status.STOPPED
    assert scontrol.asked() == ["requeue 7_3"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_stays_cancelled(
    state: str, scontrol: Scontrol, caplog: pytest.LogCaptureFixture
) -> None:
    scontrol.answers(f"JobState={state} Reason=None Dependency=(null)\n   PreemptTime=None")
    assert stays_ended("7")
    assert request_requeue("7") == exit_status.STOPPED  # and not REQUEUE: the script would ask
    assert scontrol.asked() == []
    assert "job 7 was cancelled" in caplog.text


def test_a_refused_requeue_is_left_to_the_batch_script(
    scontrol: Scontrol, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = "echo Requested operation is presently disabled for job 7 >&2; exit 1"
    scontrol.answers("JobState=RUNNING Reason=None", requeue=refusal)
    assert request_requeue("7") == exit_status.REQUEUE
    assert "presently disabled for job 7" in caplog.text


@pytest.mark.parametrize("answer", ["", "something else"])
def test_a_state_that_is_not_understood_is_left_to_the_batch_script(
    answer: str, scontrol: Scontrol
) -> None:
    scontrol.answers(answer)
    assert request_requeue("7") == exit_status.REQUEUE
    assert scontrol.asked() == []


def test_a_scontrol_that_hangs_is_left_to_the_batch_script(
    scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_train.requeue._SCONTROL_SECONDS", 0.5)
    scontrol.answers("JobState=RUNNING Reason=None", requeue="exec sleep 30")
    assert request_requeue("7") == exit_status.REQUEUE
    assert "timed out" in caplog.text


def test_without_scontrol_the_batch_script_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert request_requeue("7") == exit_status.REQUEUE
    assert caplog.text == ""
