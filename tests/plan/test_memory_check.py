"""Preflight's verdict on GPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_train.config import Config
from lora_train.config_loading import resolve
from lora_train.preflight import memory as memory_check
from lora_train.preflight.machine import Machine
from lora_train.preflight.nvml import Gpu, GpuReport
from lora_train.preflight.runner import run_checks

GIB = 2**30
H100 = round(79.2 * GIB)


def config_of(**keys: str) -> Config:
    overrides = {name.replace("__", "."): value for name, value in keys.items()}
    return resolve(factory="llama31_8b", overrides=overrides)


def test_several_changes_are_named_together_where_one_is_not_enough() -> None:
    keys = {"data__seq_length": "8192", "data__micro_batch_size": "2",
            "trainer__gradient_checkpointing": "false"}  # fmt: skip
    machine = machine_with(14 * GIB)
    [finding] = memory_check.check_memory(machine, config_of(**keys))
    assert finding.level == "error"
    words = finding.mend.removeprefix("one of: ").split(" (")[0].split()
    assert len(words) > 1
    mended = {
        **keys,
        **{word.split("=")[0].replace(".", "__"): word.split("=")[1] for word in words},
    }
    assert memory_check.check_memory(machine, config_of(**mended))[0].level == "ok"


def machine_with(memory: int) -> Machine:
    gpu = Gpu(0, "GPU-1", "NVIDIA H100 80GB HBM3", (9, 0), memory, 0)
    return Machine(ask_gpus=lambda: GpuReport((gpu,), "570.1", None, True, (12, 8)))


@pytest.mark.parametrize(
    ("memory", "level"), [(H100, "ok"), (30 * GIB, "warning"), (25 * GIB, "error")]
)
def test_preflight_refuses_what_would_run_out_of_memory(memory: int, level: str) -> None:
    config = config_of(data__micro_batch_size="4", trainer__gradient_checkpointing="false")
    [finding] = memory_check.check_memory(machine_with(memory), config)
    assert finding.level == level
    assert bool(finding.mend) == (level != "ok")


def test_little_data_fills_no_long_sequence(tmp_path: Path) -> None:
    keys = {"data__seq_length": "65536", "trainer__gradient_checkpointing": "false",
            "data__micro_batch_size": "1"}  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    for num_bytes, level in ((20_000, "warning"), (2_000_000, "error")):
        rows.write_bytes(b"x" * num_bytes)
        config = config_of(**keys, data__path=str(rows))
        [finding] = memory_check.check_memory(machine_with(H100), config)
        assert finding.level == level


@pytest.mark.parametrize(
    "keys",
    [
        {"peft__modules_to_save": "[lm_head]"},
        {"peft__target_modules": "[q_proj,lm_head]"},
        {"trainer__precision": "fp32", "kernels__fused": "off"},
    ],
)
def test_what_was_never_measured_is_not_judged(keys: dict[str, str]) -> None:
    [finding] = memory_check.check_memory(machine_with(4 * GIB), config_of(**keys))
    assert finding.level == "skipped"


def test_the_gpu_of_a_login_node_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    gpu = machine_with(8 * GIB).ask_gpus
    for run_follows, level in ((True, "error"), (False, "skipped")):
        findings = run_checks(Machine(ask_gpus=gpu, run_follows=run_follows), config_of())
        [finding] = (each for each in findings if each.check == "memory")
        assert finding.level == level


def test_the_smallest_of_several_kinds_decides() -> None:
    large = Gpu(0, "GPU-1", "NVIDIA H100 80GB HBM3", (9, 0), H100, 0)
    small = Gpu(1, "GPU-2", "NVIDIA A100-SXM4-40GB", (8, 0), 12 * GIB, 0)
    report = GpuReport((large, small), "570.1", None, True, (12, 8))
    [finding] = memory_check.check_memory(Machine(ask_gpus=lambda: report), config_of())
    assert finding.level == "error" and "A100-SXM4-40GB" in finding.seen
    one_of_them = config_of(trainer__devices="1")
    [finding] = memory_check.check_memory(Machine(ask_gpus=lambda: report), one_of_them)
    assert finding.level == "ok"
