"""A run directory as a job on two GPUs leaves it, written in a moment; the numbers are made up."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_train.cli import parse_command_line
from lora_train.config_loading import resolve, to_yaml
from lora_train.gpu_samples import COLUMNS

BEGIN = 1_790_000_000.0
MODEL = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
A100 = {
    "host": "gpu-node-1", "name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 79 << 30,
    "capability": "8.0",
}  # fmt: skip
VARIABLES = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_MEM_PER_NODE": str(256 * 1024), "SLURM_CPUS_ON_NODE": "64",
    "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_START_TIME": f"{BEGIN - 5:.0f}",
    "SLURM_JOB_END_TIME": f"{BEGIN - 5 + 4 * 3600:.0f}",
}  # fmt: skip
USAGE = {
    "num_processes": 4, "peak_rss_bytes": 31 * 2**30, "cpu_seconds": 2500.0,
    "cgroup_peak_bytes": 88 * 2**30,
}  # fmt: skip
STEP_SECONDS = 2.0


class SampleRun:
    """Writes a run of so many steps with two GPUs, which was killed once, at step 60."""

    def __init__(self, folder: Path, num_steps: int = 120, *changes: str, seed: int = 0) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self._random = random.Random(seed)
        self._lines: list[dict[str, Any]] = []
        folder.mkdir(parents=True)
        words = [
            "model.path=meta-llama/Llama-3.1-8B", "data.path=chats.jsonl",
            f"trainer.max_steps={num_steps}", f"log.name={folder.name}",
            "trainer.gradient_checkpointing=true", *changes,
        ]  # fmt: skip
        config = resolve(overrides=parse_command_line(words).overrides)
        (folder / "config.yaml").write_text(to_yaml(config))
        environment = {
            "command": ["lora-train", "--factory", "llama31_8b", *words],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(BEGIN)),
            "lora_train": "0.1.0",
            "python": "3.11.2",
            "packages": {"torch": "2.13.0", "peft": "0.21.2"},
            "device": "NVIDIA A100-SXM4-80GB, 79 GiB, compute capability 8.0",
            "devices": 2 * [A100],
            "step": 0,
            "host": "gpu-node-1",
            "variables": VARIABLES,
            "model_config": MODEL,
        }
        self.write("environment.json", [environment])
        self._write_metrics()
        self._write_timeline()

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        (self.folder / name).write_text(json.dumps(content))

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a .jsonl file."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a .jsonl file."""
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _write_metrics(self) -> None:
        rows: list[dict[str, Any]] = [{"step": 0, "val_loss": 1.62, "val_tokens": 9000}]
        for step in range(1, self.num_steps + 1):
            level = 0.55 + 1.1 * math.exp(-step / 25)
            seconds = 9.0 if step in (1, 61) else STEP_SECONDS * self._random.uniform(0.98, 1.1)
            rows.append(
                {
                    "step": step,
                    "loss": level + self._random.gauss(0, 0.05),
                    "learning_rate": 2e-4 * min(step / 10, 1 - (step - 10) / 140),
                    "grad_norm": 0.4 + math.exp(-step / 6) + self._random.uniform(0, 0.1),
                    "epoch": step / 100,
                    "tokens": 16384,
                    "supervised_tokens": 9000,
                    "attended_keys": 16384 * 400,
                    "step_time_seconds": seconds,
                    "tokens_per_second": 16384 / seconds,
                    "max_memory_allocated_bytes": 62 << 30,
                }
            )
            if step % 20 == 0:
                rows.append({"step": step, "val_loss": level + 0.04, "val_tokens": 9000})
        self.write_rows("metrics.jsonl", rows)

    def _write_timeline(self) -> None:
        end = self._start(BEGIN, 0, 75)
        # killed at step 75, in the queue for ten minutes, and on again from step 60
        end = self._start(end + 600, 60, self.num_steps)
        self._add("end", end, end, self.num_steps, reason="complete", usage=USAGE)
        self.write_rows("timeline.jsonl", self._lines)
        restarts = [{"last_step": 60, "reason": "failed or killed"}, {"reason": "complete"}]
        self.write("restarts.json", restarts)
        self.write("summary.json", {"steps": self.num_steps, "samples": []})

    def _start(self, begin: float, first: int, last: int) -> float:
        now = begin + 40
        facts = {"host": "gpu-node-1", "job": "4711", "num_processes": 2, "num_nodes": 1}
        self._add("start", begin, now, first, max_steps=self.num_steps, **facts)
        for step in range(first, last, 15):
            self._add("steps", now, now + 15 * STEP_SECONDS, step + 15, num_steps=15)
            now += 15 * STEP_SECONDS
            if step + 15 < last or last == self.num_steps:
                self._add("validation", now, now + 6, step + 15)
                self._add("checkpoint", now + 6, now + 8, step + 15)
                now += 8
        return now

    def _add(self, kind: str, begin: float, end: float, step: int, **more: Any) -> None:
        self._lines.append({"kind": kind, "begin": begin, "end": end, "step": step, **more})

    def add_gpu_log(self, num_gpus: int = 2, name: str = "gpu_memory_log.csv") -> None:
        """Write what the monitor would have seen: busy in steps, idle else, nothing in the gap."""
        rows = [", ".join(COLUMNS)]
        spans = [line for line in self._lines if line["kind"] != "end"]
        end = max(line["end"] for line in spans)
        now = BEGIN
        while now < end:
            kind = next((e["kind"] for e in spans if e["begin"] <= now < e["end"]), None)
            for gpu in range(num_gpus if kind else 0):
                is_busy = kind in ("steps", "validation")
                busy = self._random.choice([97, 99, 100, 98]) if is_busy else 0
                stamp = time.strftime("%Y/%m/%d %H:%M:%S.000", time.gmtime(now))
                power = 330 + self._random.uniform(-15, 15) if is_busy else 70
                rows.append(
                    f"{stamp}, {gpu}, {busy}, {64000 if is_busy else 17000}, 81920, {power:.2f}, "
                    f"{62 + gpu if is_busy else 38}, 1410, 0x{4 if is_busy else 1:016x}, "
                    f"GPU-{gpu:08d}-aaaa"
                )
            now += 5
        (self.folder / name).write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SampleRun]:
    """Makes sample runs by name, each in a folder of its own."""

    def make(name: str = "mine", *changes: str, **options: Any) -> SampleRun:
        folder = tmp_path_factory.mktemp("sample") / name
        return SampleRun(folder, 120, *changes, **options)

    return make


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """matplotlib's list of fonts, once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))
        yield
