"""What a step needs, what fits, and what is fastest."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from lora_train.config import Config
from lora_train.config_loading import resolve
from lora_train.gpu_specs import gpu_spec
from lora_train.known_models import MODELS
from lora_train.plan.fitting import choose, fit, largest_micro_batch, steps_of
from lora_train.plan.memory import Step, walk

EIGHT = "meta-llama/Llama-3.1-8B"
GIB = 2**30
DATA_PARALLEL = (
    Path(__file__).parents[2] / "kernels" / "benchmarks" / "results" / "data_parallel.jsonl"
)
H100 = round(79.2 * GIB)


def config_of(**keys: str) -> Config:
    overrides = {name.replace("__", "."): value for name, value in keys.items()}
    return resolve(factory="llama31_8b", overrides=overrides)


def one_step(**keys: str) -> Step:
    keys = {"trainer__gradient_checkpointing": "false", "data__micro_batch_size": "4", **keys}
    [step] = steps_of(config_of(**keys), MODELS[EIGHT], 1)
    return step


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    step = one_step()
    most = largest_micro_batch(step, H100)
    length = step.tokens // step.num_sequences

    def needs(count: int) -> int:
        of = dataclasses.replace(step, tokens=count * length, num_sequences=count)
        return fit(of).needed_bytes

    assert most > 1
    assert needs(most) <= H100 < needs(most + 1)
    assert largest_micro_batch(step, 10 * GIB) == 0


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"model__quantization": "nf4"}, {}),
        ({"trainer__gradient_checkpointing": "true"}, {}),
        ({}, {"kernels__fused": "off"}),
        ({}, {"peft__dim": "256"}),
        ({"optim__name": "adamw_8bit"}, {}),
        ({"data__micro_batch_size": "2"}, {}),
    ],
)
def test_what_saves_memory_is_planned_to(less: dict[str, str], more: dict[str, str]) -> None:
    assert walk(one_step(**less)).peak < walk(one_step(**more)).peak


def test_the_peak_is_the_sum_of_its_parts() -> None:
    tape = walk(one_step())
    assert sum(tape.at_peak.values()) == tape.peak
    assert tape.moment.startswith("backward, layer 31")
    # nothing is left over but what stays from step to step, and gradients
    assert tape.live["activations in use"] == 0


def test_more_gpus_hold_less_of_a_sharded_base_each() -> None:
    config = config_of(trainer__strategy="fsdp2", trainer__gradient_checkpointing="true",
                       data__micro_batch_size="1")  # fmt: skip
    [two], [four] = (list(steps_of(config, MODELS[EIGHT], count)) for count in (2, 4))
    assert walk(four).peak < walk(two).peak


def test_choose_counts_the_gpus_share_of_the_batch() -> None:
    spec = gpu_spec("H100-80")
    assert spec is not None
    chosen = choose(config_of(), MODELS[EIGHT], 16, H100, spec)
    assert chosen is not None and chosen[0].step.num_sequences == 1


def test_auto_does_not_count_on_the_hosts_memory() -> None:
    spec = gpu_spec("H100-80")
    assert spec is not None
    config = resolve(factory="llama31_70b_qlora", overrides={})
    model = MODELS[config.model.path]
    for memory in (52 * GIB, H100):
        chosen = choose(config, model, 1, memory, spec)
        assert chosen is not None and chosen[0].step.checkpointing
        assert fit(dataclasses.replace(chosen[0].step, keeps_on_host=False)).fits(memory)
    # but takes it where nothing else fits
    least = round(47.5 * GIB)
    chosen = choose(config, model, 1, least, spec)
    assert chosen is not None and chosen[0].fits(least)
    assert not fit(dataclasses.replace(chosen[0].step, keeps_on_host=False)).fits(least)


def test_the_gpus_that_share_a_step_as_measured() -> None:
    """The rows that benchmark_data_parallel.py measured, of the same walk."""
    for row in map(json.loads, DATA_PARALLEL.read_text().splitlines()):
        if row["benchmark"] != "data_parallel" or "checkpointing" not in row:
            continue
        size, layers = re.match(r"Llama-3.1 (\w+) shape, (\d+) layers", row["model"]).groups()  # type: ignore[union-attr]
        model = {
            **MODELS[f"meta-llama/Llama-3.1-{size.upper()}"], "num_hidden_layers": int(layers),
        }  # fmt: skip
        config = config_of(
            data__micro_batch_size="4", data__global_batch_size=str(4 * row["gpus"]),
            trainer__gradient_checkpointing=str(row["checkpointing"]).lower(),
            trainer__strategy=row["strategy"],
            model__quantization=row.get("quantization") or "null",
        )  # fmt: skip
        [step] = steps_of(config, model, row["gpus"])
        assert step.tokens * row["gpus"] == row["tokens_per_step"]
        measured = row["max_memory_allocated_gib"] * GIB
        assert walk(step).peak == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100-80"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("A100-40", "A100-40"),
        # names that begin like another's
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        # a part computes less than the whole
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
    ],
)
def test_gpus_by_name(name: str, sheet: str | None) -> None:
    spec = gpu_spec(name)
    assert (None if spec is None else spec.name) == sheet


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "gelu"}, {"attention_dropout": 0.1}],
    ids=lambda each: next(iter(each)),
)
def test_what_the_kernels_do_not_compute_is_planned_without_them(change: dict[str, object]) -> None:
    config = config_of(data__micro_batch_size="1", trainer__gradient_checkpointing="false")
    [step] = steps_of(config, {**MODELS[EIGHT], **change}, 1)
    assert not step.is_fused
