"""A run that was stopped, killed or starved goes on as if nothing had happened: N + N = 2N."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_train import checkpoint as checkpoint_module
from lora_train import run_directory
from lora_train.cli import main
from lora_train.config import Config
from lora_train.errors import RunError, UserError
from lora_train.metrics import read_metrics
from lora_train.run import run

Start = Callable[..., "subprocess.Popen[str]"]
# what the machine did, not what was computed
MEASURED = ("step_time_seconds", "tokens_per_second", "max_memory_allocated_bytes")


def final_state(folder: Path, step: int = 8) -> dict[str, Any]:
    """What must be equal to the bit: weights, optimizer, generators, metrics."""
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "weights": load_file(folder / "adapter" / "adapter_model.safetensors"),
        "optimizer": state["optimizer"],
        "random": state["random"],
        "metrics": [{key: row[key] for key in row if key not in MEASURED} for row in rows],
    }


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for n, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}/{n}")
    else:
        assert found == expected, place


@pytest.fixture
def uninterrupted(config_of: Callable[..., Config], tmp_path: Path) -> dict[str, Any]:
    """The end of the same run in one go, in another folder."""
    config = config_of(f"log.log_dir={tmp_path / 'whole'}")
    assert run(config, argv=[]) == 0
    return final_state(tmp_path / "whole" / "tiny")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_bf16_on_a_gpu(config_of: Callable[..., Config], tmp_path: Path) -> None:
    """bf16 autocast and the varlen flash kernel: two runs are equal, and so is one in two parts."""
    options = ("trainer.precision=bf16", "log.ckpt.keep_last=9")
    for name in ("one", "two", "parts"):
        assert run(config_of(*options, f"log.name={name}"), argv=[]) == 0
    whole = final_state(tmp_path / "runs" / "one")
    assert_same(final_state(tmp_path / "runs" / "two"), whole)
    parts = tmp_path / "runs" / "parts"
    for step in (8, 6):
        shutil.rmtree(parts / "checkpoints" / f"step-{step:06d}")
    (parts / "summary.json").unlink()
    assert run(config_of(*options, "log.name=parts"), argv=[]) == 0
    assert_same(final_state(parts), whole)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


# a pause in each step, so that the signal arrives between the first and the last
SLOWLY = """
import time
from lora_train.trainer import Trainer
step = Trainer.train_step
Trainer.train_step = lambda self: (time.sleep(0.3), step(self))[1]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_and_gone_on_with(
    lora_train: Start,
    config_of: Callable[..., Config],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "runs" / "tiny"
    process = lora_train("log.ckpt.every_n_train_steps=null", code=SLOWLY)
    wait_for_step(folder, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"{number.name}: stopping after this step, with a checkpoint" in errors
    assert "the same command goes on from" in errors
    [saved] = (folder / "checkpoints").iterdir()
    assert 3 <= int(saved.name[5:]) < 8
    assert not (folder / "adapter").exists()

    assert run(config_of("log.ckpt.every_n_train_steps=null"), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


def test_killed_in_mid_save(
    lora_train: Start,
    config_of: Callable[..., Config],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
) -> None:
    """SIGKILL after the files of step 4 are written, before they are renamed."""
    die = """
import os, signal
from lora_train import checkpoint
sync = checkpoint._sync
def die(path):
    if "writing-step-000004" in str(path) and path.name == "complete.json":
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
checkpoint._sync = die
"""
    folder = tmp_path / "runs" / "tiny"
    process = lora_train(code=die)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".writing-step-000004", "step-000002"]

    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000006", "step-000008"], "old checkpoints and the torn one are gone"


def test_full_disk(
    config_of: Callable[..., Config],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "runs" / "tiny"
    save = torch.save

    def full(state: Any, path: Path, *rest: Any) -> None:
        save(state, path, *rest)
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError) as caught:
        run(config_of(), argv=[])
    assert caught.value.message == (
        "cannot write the checkpoint of step 4: No space left on device"
    )
    assert "make room, then give the same command again" in str(caught.value.hint)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]

    monkeypatch.setattr(torch, "save", save)
    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "state.pt").write_bytes(b""), "state.pt has 0 bytes, expected"),
        (lambda path: (path / "complete.json").unlink(), "no complete.json: it was never finished"),
        (
            lambda path: flip_a_bit(path / "adapter" / "adapter_model.safetensors"),
            "adapter/adapter_model.safetensors was changed after it was written",
        ),
    ],
)
def test_broken_checkpoint_is_skipped_by_name(
    config_of: Callable[..., Config],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    folder = tmp_path / "whole" / "tiny"
    damage(folder / "checkpoints" / "step-000008")
    (folder / "summary.json").unlink()
    found = checkpoint_module.newest_complete(folder / "checkpoints")
    assert found is not None and found.step == 6
    assert f"skipping broken checkpoint {folder}/checkpoints/step-000008: {said}" in caplog.text
    assert run(config_of(f"log.log_dir={tmp_path / 'whole'}"), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_metrics_cut_in_mid_line(
    config_of: Callable[..., Config], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "whole" / "tiny"
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    (folder / "summary.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    assert run(config_of(f"log.log_dir={tmp_path / 'whole'}"), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


def test_stop_during_validation(
    config_of: Callable[..., Config],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation of step 3 is broken off, and done when the run goes on."""
    from lora_train.trainer import Trainer

    validate = Trainer.validate

    def interrupted(self: Trainer, stop: Any = None) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, stop)

    monkeypatch.setattr(Trainer, "validate", interrupted)
    assert run(config_of(), argv=[]) == 75
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "checkpoints" / "step-000003").is_dir()
    monkeypatch.setattr(Trainer, "validate", validate)
    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


def test_not_finite_and_gone_on_with(
    config_of: Callable[..., Config], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of("optim.lr=1e30", "trainer.gradient_clip_val=null")
    with pytest.raises(RunError, match=r"step \d: loss .*: not finite") as caught:
        run(config, argv=[])
    assert "the same command with a lower optim.lr goes on from" in str(caught.value)
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "checkpoints").exists(), "weights that give NaN were saved"
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(row["loss"] < float("inf") for row in rows if "loss" in row)
    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)


def stopped_at_4(config_of: Callable[..., Config], *changes: str) -> None:
    """A run that was told to stop after its fourth step."""
    from lora_train.trainer import Trainer

    step = Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run(config_of(*changes), argv=[]) == 75


def test_a_lower_learning_rate_counts_from_the_resumed_step(
    config_of: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at_4(config_of)
    assert run(config_of("optim.lr=1e-5", "optim.weight_decay=0.1"), argv=[]) == 0
    assert "changed since step 4: optim.lr: 0.01 -> 1e-05" in capsys.readouterr().err
    rows = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert min(rates[:4]) > 1e-3 and max(rates[4:]) <= 1e-5
    path = tmp_path / "runs" / "tiny" / "checkpoints" / "step-000008" / "state.pt"
    state = torch.load(path, weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "change",
    [
        "peft.modules_to_save=[lm_head]",
        "trainer.gradient_checkpointing=true",
        "peft.use_dora=true",
        "peft.init=pissa",
        "model.quantization=nf4",
        "optim.name=adamw_8bit",
        "optim.loraplus_lr_ratio=16",
    ],
)
def test_bf16_runs_in_two_parts(
    words_with: Callable[..., list[str]],
    config_of: Callable[..., Config],
    tmp_path: Path,
    change: str,
) -> None:
    """What combines with bf16 autocast trains, and goes on to the bit."""
    changes = [change, "trainer.precision=bf16"]
    if "init" in change:
        changes.append("peft.dropout=0")
    assert run(config_of(*changes, f"log.log_dir={tmp_path / 'whole'}"), argv=[]) == 0
    stopped_at_4(config_of, *changes)
    assert run(config_of(*changes), argv=[]) == 0
    assert_same(final_state(tmp_path / "runs" / "tiny"), final_state(tmp_path / "whole" / "tiny"))
    losses = [
        row["loss"]
        for row in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
        if "loss" in row
    ]
    assert losses[-1] < losses[0]


def test_changed_rank_pattern_is_refused(config_of: Callable[..., Config]) -> None:
    stopped_at_4(config_of)
    with pytest.raises(UserError, match=r"peft.rank_pattern: \{\} -> \{'q_proj': 2\}"):
        run(config_of("peft.rank_pattern={q_proj: 2}"), argv=[])


def test_other_held_out_questions_after_a_resume(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    """Answers from before are shown beside those after only when both were asked the same."""
    stopped_at_4(config_of)
    assert run(config_of("eval.num_generate=4"), argv=[]) == 0
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["before"]["exact_match"] is None
    assert summary["num_generate"] == 4 and summary["samples"] == []


def test_changed_data_is_refused(
    config_of: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    lines = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:60]))
    stopped_at_4(config_of, f"data.path={data}")
    data.write_text("".join(lines))
    with pytest.raises(UserError, match="the training data is not what the checkpoint of step 4"):
        run(config_of(f"data.path={data}"), argv=[])
    data.write_text("".join(lines[:60]))
    assert run(config_of(f"data.path={data}"), argv=[]) == 0


def test_cut_config_file(
    config_of: Callable[..., Config], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    stopped_at_4(config_of)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text("")
    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(tmp_path / "runs" / "tiny"), uninterrupted)


def test_start_without_a_checkpoint_leaves_nothing(
    config_of: Callable[..., Config], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """What a run killed before its first checkpoint wrote is not taken for this run's."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("peft: {dim: 99}\n")
    (folder / "metrics.jsonl").write_text('{"step": 0, "val_loss": 99.0}\n')
    whole = json.loads((tmp_path / "whole" / "tiny" / "answers_before.json").read_text())
    (folder / "answers_before.json").write_text(json.dumps(whole | {"answers": ["stale"] * 2}))
    assert run(config_of(), argv=[]) == 0
    assert_same(final_state(folder), uninterrupted)
    assert "stale" not in (folder / "summary.json").read_text()


def test_newest_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    """A broken one of a later step, skipped when the run went on, does not count as kept."""

    def write(step: int) -> checkpoint_module.Checkpoint:
        return checkpoint_module.write_checkpoint(
            tmp_path, step, state={"step": step}, save_adapter=lambda folder: folder.mkdir()
        )

    for step in (2, 4, 100):
        write(step)
    (tmp_path / "step-000100" / "state.pt").unlink()
    (tmp_path / ".writing-step-000050").mkdir()
    checkpoint_module.delete_old(write(6), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


class TestRunDirectory:
    def test_complete_run_is_not_repeated(
        self,
        config_of: Callable[..., Config],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(config_of(), argv=[]) == 0
        folder = tmp_path / "runs" / "tiny"

        def times() -> dict[Path, int]:
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
            return {path: path.stat().st_mtime_ns for path in files}

        before = times()
        capsys.readouterr()
        assert run(config_of(), argv=[]) == 0
        output = capsys.readouterr()
        assert "is complete; --resume never trains a new one beside it" in output.err
        assert "8 steps in" in output.out
        assert times() == before

    def test_a_job_that_comes_back_goes_on_also_with_never(
        self,
        config_of: Callable[..., Config],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Or each start of a requeued job would begin anew, in a directory of its own, for ever."""
        (tmp_path / "runs" / "tiny").mkdir(parents=True)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert run(config_of("resume.mode=never", "--max-steps", "2"), argv=[]) == 0
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert run(config_of("resume.mode=never", "--max-steps", "4"), argv=[]) == 0
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
        steps = [row["step"] for row in read_metrics(tmp_path / "runs/tiny-2/metrics.jsonl")]
        assert sorted(set(steps) - {0}) == [1, 2, 3, 4]
        monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job, and its own new start
        assert run(config_of("resume.mode=never", "--max-steps", "2"), argv=[]) == 0
        assert (tmp_path / "runs" / "tiny-3").is_dir()

    def test_complete_run_is_shown_on_a_full_disk(
        self,
        config_of: Callable[..., Config],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(dir: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        capsys.readouterr()
        monkeypatch.setattr(run_directory.tempfile, "TemporaryFile", full)
        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        assert "2 steps in" in capsys.readouterr().out
        with pytest.raises(UserError, match="No space left on device"):
            run(config_of("log.name=other"), argv=[])

    def test_link_that_leads_nowhere(
        self, config_of: Callable[..., Config], tmp_path: Path
    ) -> None:
        (tmp_path / "runs").symlink_to("/nonexistent/scratch")
        with pytest.raises(UserError, match="runs is a link to /nonexistent/scratch, which does"):
            run(config_of(), argv=[])

    def test_never_starts_over_beside_it(
        self, config_of: Callable[..., Config], tmp_path: Path
    ) -> None:
        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        assert run(config_of("--max-steps", "2", "--resume", "never"), argv=[]) == 0
        first, second = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny-2"
        assert_same(final_state(second, 2), final_state(first, 2))

    def test_longer_run_goes_on(
        self,
        config_of: Callable[..., Config],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        assert run(config_of("--max-steps", "5"), argv=[]) == 0
        assert "changed since step 2: trainer.max_steps: 2 -> 5" in capsys.readouterr().err
        folder = tmp_path / "runs" / "tiny"
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
        summary = json.loads((folder / "summary.json").read_text())
        answered = json.loads((folder / "answers_after.json").read_text())
        assert summary["steps"] == 5
        assert [sample["after"] for sample in summary["samples"]] == answered["answers"]

    def test_stopped_longer_run_is_not_complete(
        self, config_of: Callable[..., Config], tmp_path: Path
    ) -> None:
        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        longer = ("trainer.max_steps=null", "trainer.max_epochs=0.5")
        stopped_at_4(config_of, *longer)
        assert run(config_of(*longer), argv=[]) == 0
        summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
        assert summary["steps"] == 7, "half of 28 packs, 2 a step"

    def test_other_settings_are_refused_by_name(
        self, config_of: Callable[..., Config], tmp_path: Path
    ) -> None:
        assert run(config_of("--max-steps", "2"), argv=[]) == 0
        with pytest.raises(UserError) as caught:
            run(config_of("--max-steps", "4", "peft.dim=8", "data.seq_length=64"), argv=[])
        assert caught.value.message == (
            f"{tmp_path}/runs/tiny holds a run of 2 steps made with other settings:\n"
            "  data.seq_length: 96 -> 64\n  peft.dim: 4 -> 8"
        )

    def test_in_use(
        self, config_of: Callable[..., Config], lora_train: Start, tmp_path: Path
    ) -> None:
        process = lora_train(code=SLOWLY)
        wait_for_step(tmp_path / "runs" / "tiny", 1)
        with pytest.raises(UserError, match="is in use by another lora-train"):
            run(config_of(), argv=[])
        process.kill()
        process.communicate()

    def test_foreign_folder(self, config_of: Callable[..., Config], tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "tiny"
        folder.mkdir(parents=True)
        (folder / "thesis.tex").touch()
        with pytest.raises(UserError, match="is not a run directory: it holds thesis.tex and no"):
            run(config_of(), argv=[])
        assert [path.name for path in folder.iterdir()] == ["thesis.tex"]

    def test_what_is_recorded(self, config_of: Callable[..., Config], tmp_path: Path) -> None:
        from lora_train.config_loading import resolve

        config = config_of("--max-steps", "2", "data.micro_batch_size=auto")
        assert config.trainer.gradient_checkpointing == "auto"
        assert run(config, argv=["lora-train", "--max-steps", "2"]) == 0
        folder = tmp_path / "runs" / "tiny"
        # what was left to the machine stands there as it was settled
        settled = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, micro_batch_size=1),
            trainer=dataclasses.replace(config.trainer, gradient_checkpointing=False),
        )
        assert resolve(config_file=folder / "config.yaml") == settled
        [environment] = json.loads((folder / "environment.json").read_text())
        assert environment["command"] == ["lora-train", "--max-steps", "2"]
        assert environment["packages"]["torch"] == metadata.version("torch")
        assert list((folder / "trackers").rglob("events.out.tfevents.*"))
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 2
        assert "step" in (folder / "train.log").read_text()


class TestRefusals:
    def refusal(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        assert main(words) == 2
        return capsys.readouterr().err.partition("error: ")[2]

    def test_batch_that_does_not_divide(
        self, words_with: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = words_with("data.global_batch_size=6", "data.micro_batch_size=4")
        assert self.refusal(words, capsys) == (
            "data.global_batch_size=6 does not divide into micro-batches of 4 on 1 process\n"
            "hint: data.micro_batch_size=1 or 2 or 3 or 6, or data.global_batch_size=4 or 8\n"
        )

    def test_more_devices_than_there_are(
        self,
        words_with: Callable[..., list[str]],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        message = self.refusal(words_with("trainer.devices=2"), capsys)
        assert "trainer.devices=2, and 1 GPU(s) are visible on " in message

    def test_missing_tracker(
        self,
        words_with: Callable[..., list[str]],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import importlib.util

        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
        )
        assert self.refusal(words_with("log.trackers=[wandb]"), capsys) == (
            "log.trackers: wandb not installed\n"
            "hint: pip install wandb, or log.trackers=[tensorboard]\n"
        )

    def test_too_little_room(
        self, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import shutil
        from types import SimpleNamespace

        room = SimpleNamespace(total=2000, free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
        with pytest.raises(UserError, match="0 MiB free, the checkpoints take"):
            run(config_of(), argv=[])


class TestTwoProcesses:
    """The whole program under torchrun, on CPU ranks."""

    def start(self, words: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "lora_train_main.py"
        program.write_text("import sys\nfrom lora_train.cli import main\nsys.exit(main())\n")
        return subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", str(program), *words,
            ],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env=os.environ
            | {"LORA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
               "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def test_same_curve_as_one(
        self,
        config_of: Callable[..., Config],
        words_with: Callable[..., list[str]],
        tmp_path: Path,
    ) -> None:
        options = ("peft.dropout=0", "data.global_batch_size=4", "log.name=two")
        done = self.start(words_with(*options, "trainer.devices=2"), tmp_path)
        assert done.returncode == 0, done.stderr
        assert (
            "4 sequences per step = 1 per micro-batch x 2 accumulated x 2 processes" in done.stderr
        )
        assert run(config_of(*options, "log.name=one"), argv=[]) == 0
        curves = [
            [(row["step"], row.get("loss", row.get("val_loss"))) for row in read_metrics(file)]
            for file in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
        ]
        assert len(curves) == 2 and len(curves[0]) == len(curves[1])
        for one, two in zip(*curves, strict=True):
            assert one == pytest.approx(two, rel=1e-4)

    def test_both_refuse(self, words: list[str], tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "tiny"
        folder.mkdir(parents=True)
        (folder / "thesis.tex").touch()
        done = self.start(words, tmp_path)
        assert done.returncode != 0
        assert done.stderr.count("is not a run directory: it holds thesis.tex") == 1
        assert "ends, because rank 0 has failed" in done.stderr


def test_signal_before_the_first_step(lora_train: Start, tmp_path: Path) -> None:
    """While the data is prepared there is nothing to save: the run ends at once."""
    slow_data = """
import time
from lora_train import run
run.prepare_data = lambda *rest, **options: (print("preparing", flush=True), time.sleep(60))
"""
    process = lora_train(code=slow_data)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "the same command goes on" in errors
    assert not (tmp_path / "runs" / "tiny").exists()


def test_refused_input_leaves_no_directory(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        run(config_of("data.path=nowhere.jsonl"), argv=[])
    assert not (tmp_path / "runs" / "tiny").exists()
