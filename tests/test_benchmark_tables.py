"""The README's tables and the chart of the training step are what the benchmarks' rows give."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kernels/benchmarks/make_tables.py"
README = """# Made up, with a \N{GREEK CAPITAL LETTER DELTA}

<!-- training-step: begin -->
<!-- training-step: end -->

between

<!-- operations: begin -->
old
<!-- operations: end -->

after
"""
COMMON = {
    "date": "2026-01-02",
    "gpu": "GPU <1>",
    "torch": "2.0",
    "triton": "3.0",
}
STEP = {
    **COMMON,
    "transformers": "5.0",
    "peft": "0.2",
    "model": "Tiny shape, 2 layers",
    "lora": "r 16",
    "tokens_per_step": 8192,
    "sequences": 4,
    "step_seconds_median": 0.5,
    "kernel_seconds": 0.45,
    "max_memory_allocated_gib": 50.66,
}
OPERATION = {
    **COMMON,
    "shape": {"name": "Tiny", "num_tokens": 8192, "sequence": 2048, "rank": 16},
    "dtype": "bfloat16",
    "operation": "attention",
    "gb_per_second": 100.0,
    "tflop_per_second": 412.3,
}


def step(variant: str, speed: float, **other: object) -> dict:
    return {**STEP, "variant": variant, "tokens_per_second": speed, **other}


def operation(provider: str, ms: float, **other: object) -> dict:
    return {**OPERATION, "provider": provider, "ms": ms, **other}


class Checkout:
    """A copy of the script with results of its own: it finds everything by its own place."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "kernels/benchmarks"
        (self.folder / "results").mkdir(parents=True)
        shutil.copy(SCRIPT, self.folder)
        self.readme, self.chart = root / "README.md", self.folder / "training_step.svg"
        self.readme.write_text(README, "utf-8")

    def write(self, name: str, *rows: dict) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "results" / f"{name}.jsonl").write_text(lines)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(self.folder / SCRIPT.name), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def made(self) -> str:
        result = self.run()
        assert result.returncode == 0, result.stderr
        return self.readme.read_text("utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path)
    checkout.write(
        "training_step",
        step("liger + PEFT, bf16 adapters", 10000.0),
        step("fused", 12500.4),
        step("fused, again", 1.0),
    )
    checkout.write(
        "operations",
        operation("ours", 1.0),
        operation("torch, flash varlen", 1.75),
        operation("torch, cuDNN", 1.5),
        operation("ours", 0.5, operation="norm", tflop_per_second=None),
        operation("torch", 1.0, operation="norm"),
        operation("ours", 0.25, operation="alone"),
    )
    return checkout


def test_a_round_trip(checkout: Checkout):
    assert checkout.run("--check").returncode == 1
    assert checkout.readme.read_text("utf-8") == README and not checkout.chart.exists()
    text = checkout.made()
    assert checkout.run("--check").returncode == 0
    assert checkout.made() == text
    lines = text.splitlines()
    # in the script's order, and only what it names
    ours = lines.index("| lora-train, fused | 12,500 | 1.25 | 50.7 | 90% |")
    assert lines[ours + 1] == "| liger + PEFT, bf16 adapters | 10,000 | 1.00 | 50.7 | 90% |"
    assert "again" not in text and "old" not in lines
    assert "| attention | 1.000 | 1.500 (cuDNN) | 1.50 | 412 TFLOP/s |" in lines
    assert "| norm | 0.500 | 1.000 | 2.00 | 100 GB/s |" in lines
    assert "| alone | 0.250 | - | - | 412 TFLOP/s |" in lines
    step_setting, operation_setting = (line for line in lines if line.startswith("GPU <1>"))
    assert "torch 2.0, triton 3.0, transformers 5.0, peft 0.2; Tiny shape" in step_setting
    assert "8,192 tokens in 4 sequences" in step_setting and "2026-01-02" in step_setting
    assert "torch 2.0, triton 3.0; Tiny shape, r 16" in operation_setting
    # the text around the tables stays
    for part in (README.splitlines()[0], "between", "after"):
        assert part in lines


def test_the_chart_is_svg_with_every_value(checkout: Checkout):
    checkout.made()
    texts = [element.text for element in ET.parse(checkout.chart).iter() if element.text]
    assert {"lora-train, fused", "12,500", "liger + PEFT, bf16 adapters", "10,000"} <= set(texts)


@pytest.mark.parametrize("name", ["readme", "chart"])
def test_the_check_fails_after_a_change(checkout: Checkout, name: str):
    checkout.made()
    file: Path = getattr(checkout, name)
    changed = file.read_text("utf-8").replace("12,500", "12,501")
    file.write_text(changed, "utf-8")
    result = checkout.run("--check")
    assert result.returncode == 1 and file.name in result.stderr
    assert file.read_text("utf-8") == changed


def test_the_newest_row_of_the_newest_setting_counts(checkout: Checkout):
    checkout.write(
        "training_step",
        step("fused", 3.0, date="2026-01-03"),
        step("fused", 4.0, date="2026-01-03"),
        step("fused", 5.0),
        step("fused, rank 64", 6.0),
        step("fused, nf4", 7.0, torch="1.0"),
    )
    text = checkout.made()
    assert "| lora-train, fused | 4 | - |" in text and "| fused, rank 64 | 6 |" in text
    assert "nf4" not in text
    assert "; 2026-01-02, 2026-01-03." in text


def test_more_than_all_of_the_time_is_explained(checkout: Checkout):
    assert "Above 100 %" not in checkout.made()
    checkout.write("training_step", step("fused, checkpointing", 3.0, kernel_seconds=0.55))
    assert "110% |" in checkout.made()
    assert "Above 100 %" in checkout.made()


def test_missing_markers_are_named(checkout: Checkout):
    damaged = README.replace("<!-- operations: end -->", "")
    checkout.readme.write_text(damaged, "utf-8")
    result = checkout.run()
    assert result.returncode == 1
    assert "<!-- operations: end -->" in result.stderr and "begin" not in result.stderr
    assert checkout.readme.read_text("utf-8") == damaged and not checkout.chart.exists()


def test_without_rows_of_the_new_format_nothing_is_touched(checkout: Checkout):
    old = step("fused", 1.0)
    del old["kernel_seconds"]
    checkout.write("training_step", old)
    result = checkout.run()
    assert result.returncode == 1 and "kernel_seconds" in result.stderr
    assert checkout.readme.read_text("utf-8") == README and not checkout.chart.exists()


def test_operations_not_measured_are_said_to_be(checkout: Checkout):
    (checkout.folder / "results/operations.jsonl").unlink()
    assert "Not measured yet" in checkout.made()
