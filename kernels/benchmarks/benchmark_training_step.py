"""Training steps of Llama-3.1-8B's shape on one GPU: lora-train's loop beside stock PEFT.

    python kernels/benchmarks/benchmark_training_step.py [--steps 20] [--sequences 4]

Random weights and tokens (speed and memory do not depend on their values); every step is forward,
loss on all tokens, backward, gradient clipping and AdamW. Prints a table and appends one JSON row
per variant to results/training_step.jsonl. All variants run in this one process, on the same base
weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_train.adapter import attach_adapter
from lora_train.attention import VARLEN
from lora_train.config import Config, DataConfig, ModelConfig, TrainerConfig
from lora_train.data.packing import one_per_pack
from lora_train.data.prepared import PreparedData
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import Tokenized
from lora_train.device import compute_deterministically
from lora_train.run import make_trainer

RESULTS = Path(__file__).parent / "results" / "training_step.jsonl"
SEQUENCE = 2048
# steps that are not timed: the first compiles and fills the allocator
WARMUP = 4


def llama31_8b() -> LlamaConfig:
    """The shape of meta-llama/Llama-3.1-8B, from its config.json."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
    )  # fmt: skip


def timed(steps: int, step: Callable[[], float]) -> dict[str, Any]:
    """Run the steps; median time of those after the warm-up, and the peak memory of all."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "step_seconds_median": median(seconds[WARMUP:]),
        "step_seconds_min": min(seconds[WARMUP:]),
        "max_memory_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def ours(base: LlamaForCausalLM, steps: int, sequences: int, tokens: np.ndarray) -> dict[str, Any]:
    """lora-train's own loop: one padding-free row, fp32 adapters, bf16 autocast."""
    base.set_attn_implementation(VARLEN)
    config = Config(
        model=ModelConfig(path="random"),
        data=DataConfig(path="random", global_batch_size=sequences, micro_batch_size=sequences),
        trainer=TrainerConfig(max_steps=steps),
    )
    learned = np.ones(SEQUENCE, dtype=bool)
    examples = TokenizedSet.of([Tokenized(row, learned) for row in tokens])
    packs = one_per_pack(len(examples))
    data = PreparedData(examples, packs, None, None, None, "")  # type: ignore[arg-type]
    compute_deterministically()
    model = attach_adapter(base, config)
    model.train()
    trainer = make_trainer(config, model, data, Accelerator(mixed_precision="bf16"))
    result = timed(steps, lambda: trainer.train_step().loss)
    model.unload()
    torch.use_deterministic_algorithms(False)
    return result


def stock(
    base: LlamaForCausalLM, steps: int, sequences: int, tokens: np.ndarray, *, autocast: bool
) -> dict[str, Any]:
    """Plain transformers + PEFT with their defaults: sdpa, fp32 adapters, the model's own loss."""
    base.set_attn_implementation("sdpa")
    model = get_peft_model(
        base,
        LoraConfig(
            r=16, lora_alpha=32, task_type="CAUSAL_LM",
            target_modules=[
                "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
            ],
        ),
    )  # fmt: skip
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    rows = torch.from_numpy(tokens.astype(np.int64)).cuda()
    done = 0

    def step() -> float:
        nonlocal done
        first = done * sequences % len(rows)
        ids = rows[first : first + sequences]
        done += 1
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    result = timed(steps, step)
    model.unload()
    return result


def main() -> None:
    """Measure every variant and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per variant")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of 2048 per step")
    parser.add_argument("--layers", type=int, default=32, help="fewer than 32 for a small GPU")
    arguments = parser.parse_args()
    shape = llama31_8b()
    shape.num_hidden_layers = arguments.layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16)
    base.requires_grad_(False)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (arguments.sequences * 4, SEQUENCE)).astype(np.int32)
    run = (base, arguments.steps, arguments.sequences, tokens)
    variants: dict[str, Callable[[], dict[str, Any]]] = {
        "lora-train": lambda: ours(*run),
        "stock PEFT": lambda: stock(*run, autocast=False),
        "stock PEFT, bf16 autocast": lambda: stock(*run, autocast=True),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    ).stdout.strip()
    common = {
        "benchmark": "training_step",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "model": f"Llama-3.1-8B shape, {arguments.layers} layers, random weights, bf16",
        "lora": "r 16, all seven linears",
        "tokens_per_step": arguments.sequences * SEQUENCE,
        "sequences": arguments.sequences,
        "steps": arguments.steps,
        "commit": commit or None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    print(f"{common['gpu']}: {common['model']}, {arguments.sequences} x {SEQUENCE} tokens per step")
    for name, measure in variants.items():
        result = measure()
        speed = common["tokens_per_step"] / result["step_seconds_median"]
        row = {**common, "variant": name, "tokens_per_second": speed, **result}
        print(
            f"{name:28} {speed:9,.0f} tok/s {row['max_memory_allocated_gib']:7.1f} GiB", flush=True
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
