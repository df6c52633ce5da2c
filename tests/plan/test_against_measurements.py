"""The plan, held against real steps: the rows that benchmark_plan.py measured on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_train.config_loading import resolve
from lora_train.gpu_specs import gpu_spec
from lora_train.known_models import MODELS
from lora_train.plan.fitting import fit, steps_of
from lora_train.plan.memory import Step
from lora_train.plan.speed import step_time

RESULTS = Path(__file__).parents[2] / "kernels" / "benchmarks" / "results" / "plan.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in RESULTS.read_text().splitlines()]
FITTING = [row for row in ROWS if not row.get("is_out_of_memory")]


def step_of(keys: dict[str, str]) -> Step:
    is_off = {"trainer.gradient_checkpointing": "false"}  # where a row does not say
    config = resolve(factory="quickstart", overrides={**is_off, **keys, "peft.alpha": "32"})
    [step] = steps_of(config, MODELS[config.model.path], 1)
    return step


def name(row: dict[str, Any]) -> str:
    values = [value for key, value in row["setting"].items() if key != "data.path"]
    return "-".join([row["gpu"].split()[1], *(value.rpartition("/")[2] for value in values)])


@pytest.mark.parametrize("row", FITTING, ids=map(name, FITTING))
def test_the_peak_is_within_5_percent_and_never_2_under(row: dict[str, Any]) -> None:
    planned, measured = fit(step_of(row["setting"])).peak_bytes, row["max_memory_allocated_bytes"]
    assert 0.98 <= planned / measured <= 1.05


@pytest.mark.parametrize("row", FITTING, ids=map(name, FITTING))
def test_the_time_is_within_15_percent(row: dict[str, Any]) -> None:
    spec = gpu_spec(row["gpu"])
    assert spec is not None
    planned = step_time(step_of(row["setting"]), spec)
    # what the host bounds was measured twice in some settings, up to 35 % apart
    allowed = 0.25 if planned.is_host_bound else 0.15
    assert 1 - allowed <= planned.seconds / row["step_seconds"] <= 1 + allowed


def test_what_ran_out_of_memory_was_planned_to() -> None:
    for row in ROWS:
        is_planned_to_fit = fit(step_of(row["setting"])).fits(row["memory_bytes"])
        assert not (row.get("is_out_of_memory") and is_planned_to_fit)


def test_the_rows_cover_what_they_should() -> None:
    settings = [row["setting"] for row in ROWS]
    assert len({json.dumps(each, sort_keys=True) for each in settings}) >= 12
    assert sum(row["is_held_out"] for row in ROWS) >= 6  # no rate was fitted to these
    assert {each["model.path"] for each in settings} >= {
        "embedded:smollm2-135m-instruct", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B",
    }  # fmt: skip
    lengths = {int(each["data.seq_length"]) for each in settings}
    assert min(lengths) <= 512 and max(lengths) >= 16384
    assert {each.get("model.quantization") for each in settings} == {None, "nf4"}
    # a run whose kernels fell back would be another plan's
    assert all(row["is_fused"] == (row["setting"].get("kernels.fused") != "off") for row in FITTING)
