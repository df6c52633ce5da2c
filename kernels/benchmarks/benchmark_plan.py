"""What `lora-train plan` predicts, held against real steps of the same settings on one GPU.

    python kernels/benchmarks/benchmark_plan.py [--only "8B;nf4"] [--result FILE]

Each setting runs in a process of its own, as a run does: random weights of the model's shape, full
sequences. Appends one JSON row per setting to results/plan.jsonl with what was measured; the
predictions are made anew from it (`tests/plan/test_against_measurements.py`), so they are those of
the code as it is now.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_train.config_loading import resolve
from lora_train.known_models import MODELS

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
SMOL, ONE, EIGHT, QWEN, MISTRAL, SEVENTY = (
    "embedded:smollm2-135m-instruct", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-8B", "mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.1-70B",
)  # fmt: skip
NF4 = {"model.quantization": "nf4"}
CHECKPOINTED = {"trainer.gradient_checkpointing": "true"}
UNFUSED = {"kernels.fused": "off"}


def setting(model: str, length: int, micro: int, **others: str) -> dict[str, str]:
    """Return the keys of a run, by dotted name."""
    keys = {name.replace("__", "."): value for name, value in others.items()}
    return {
        "model.path": model,
        "data.path": "random",
        "data.seq_length": str(length),
        "data.micro_batch_size": str(micro),
        "data.global_batch_size": str(micro),
        "trainer.gradient_checkpointing": "false",
        **keys,
    }


# what the rates in `plan.speed` and the constants in `plan.memory` were fitted to
FITTED: list[dict[str, str]] = [
    setting(SMOL, 512, 1),
    setting(SMOL, 1024, 8),
    setting(SMOL, 2048, 16),
    setting(SMOL, 2048, 4, **UNFUSED),
    setting(SMOL, 8192, 4, **NF4),
    setting(ONE, 512, 4),
    setting(ONE, 2048, 1),
    setting(ONE, 2048, 8),
    setting(ONE, 4096, 4, peft__dim="64"),
    setting(ONE, 16384, 1, **CHECKPOINTED),
    setting(ONE, 4096, 2, **UNFUSED),
    setting(ONE, 4096, 4, **UNFUSED, **CHECKPOINTED),
    setting(ONE, 2048, 4, **NF4),
    setting(EIGHT, 512, 1),
    setting(EIGHT, 2048, 1),
    setting(EIGHT, 2048, 4),
    setting(EIGHT, 2048, 2) | {"data.global_batch_size": "8"},
    setting(EIGHT, 8192, 1, peft__dropout="0.1"),
    setting(EIGHT, 16384, 1, **CHECKPOINTED),
    setting(EIGHT, 512, 8, **NF4),
    setting(EIGHT, 4096, 2, **NF4),
    setting(EIGHT, 16384, 1, **NF4),
    setting(EIGHT, 8192, 2, **NF4, **CHECKPOINTED),
    setting(EIGHT, 2048, 2, **UNFUSED),
    setting(QWEN, 2048, 4),
    setting(QWEN, 4096, 2, **CHECKPOINTED),
    setting(ONE, 8192, 1, **NF4, **CHECKPOINTED),
    setting(EIGHT, 4096, 1, peft__dim="32", optim__name="adamw_8bit"),
    setting(QWEN, 2048, 2, **NF4),
]
# and what they were not; the last two are the largest micro-batch of 80 GB, and too much for it
HELD_OUT: list[dict[str, str]] = [
    setting(MISTRAL, 2048, 4),
    setting(ONE, 2048, 16),
    setting(EIGHT, 1024, 8),
    setting(SEVENTY, 2048, 4, **NF4, **CHECKPOINTED),
    setting(EIGHT, 2048, 9),
    setting(EIGHT, 2048, 11),
]


def measure(keys: dict[str, str], steps: int) -> dict[str, Any]:
    """Probe one setting."""
    import torch

    from lora_train.plan.probe import probe

    config = resolve(factory="quickstart", overrides={**keys, "peft.alpha": "32"})
    try:
        result = dataclasses.asdict(probe(config, MODELS[keys["model.path"]], steps=steps))
    except torch.OutOfMemoryError:
        result = {"is_out_of_memory": True}
    properties = torch.cuda.get_device_properties(0)
    return {**result, "gpu": properties.name, "memory_bytes": properties.total_memory}


def main() -> None:
    """Measure every setting and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="parts of settings, between semicolons")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each setting")
    parser.add_argument("--result", type=Path, default=RESULTS, help="file that gets the rows")
    parser.add_argument("--commit", help="of this code, for the rows")
    arguments = parser.parse_args()
    words = [word.strip() for word in arguments.only.split(";")]
    for keys in [*HELD_OUT, *FITTED]:
        if not any(word in json.dumps(keys) for word in words):
            continue
        context = multiprocessing.get_context("spawn")
        begun = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                measured = process.submit(measure, keys, arguments.steps).result()
            except Exception as error:  # the other settings are still worth having
                print(f"{json.dumps(keys)}: {error!r}", flush=True)
                continue
        row = {
            "benchmark": "plan",
            "date": time.strftime("%Y-%m-%d"),
            "setting": keys,
            "is_held_out": keys in HELD_OUT,
            **measured,
            "commit": arguments.commit,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "triton", "transformers")},
        }
        print(
            f"{json.dumps(keys)}: {measured.get('step_seconds', 0) * 1e3:.1f} ms, "
            f"{measured.get('max_memory_allocated_bytes', 0) / 2**30:.2f} GiB "
            f"(took {time.perf_counter() - begun:.0f} s)",
            flush=True,
        )
        with arguments.result.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
