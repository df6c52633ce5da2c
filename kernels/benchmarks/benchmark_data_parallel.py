"""Training steps on several GPUs: their speed, what the sum of the gradients costs, the same curve.

    torchrun --nproc-per-node 4 kernels/benchmarks/benchmark_data_parallel.py
    torchrun --nproc-per-node 4 ... --strategy fsdp2 --shape 70b --checkpointing
    torchrun --nproc-per-node 4 ... --loss-curve 60

Each GPU has 8192 random tokens a step, in 4 sequences. A timed step begins on all GPUs at once;
every other one leaves the sums over the GPUs out, so that both kinds see the same clocks. Of each
kind the median of the slowest GPU counts. With --loss-curve a tiny model learns to count, from the
same global batches on any number of GPUs. For fsdp2 and nf4 a model is written to a folder of its
shape in --folder, unless it is there, and loaded as a run does. Appends one JSON row; --shape tiny
runs on CPUs, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from benchmark_loading import HostMemory, make_checkpoint
from benchmark_training_step import UNIFORM, WARMUP, llama31_8b
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_train.adapter import attach_adapter
from lora_train.assembly import make_trainer
from lora_train.attention import VARLEN
from lora_train.config import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from lora_train.data.packing import one_per_pack
from lora_train.data.prepared import PreparedData
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import Tokenized
from lora_train.device import compute_deterministically
from lora_train.fusion import fuse_model
from lora_train.model import load_base_model
from lora_train.sharding import make_mesh
from lora_train.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "data_parallel.jsonl"
CURVE_BATCH = 16
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZES: dict[str, dict[str, int]] = {
    "8b": {},
    # meta-llama/Llama-3.1-70B, from its config.json
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
Row = dict[str, Any]


def model_shape(name: str, num_layers: int | None) -> LlamaConfig:
    """Return the configuration of a model of that size, cut to so many layers."""
    shape = llama31_8b()
    for key, value in SIZES[name].items():
        setattr(shape, key, value)
    shape.head_dim = shape.hidden_size // shape.num_attention_heads
    if num_layers is not None:
        shape.num_hidden_layers = num_layers
    return shape


def model_section(arguments: argparse.Namespace, name: str, shape: LlamaConfig) -> ModelConfig:
    """Name the folder of a model of that shape: one of another shape is not taken for it."""
    folder = arguments.folder / f"{name}_{shape.num_hidden_layers}"
    return ModelConfig(path=str(folder), quantization=arguments.quantization)


def random_base(shape: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """Make a frozen model on this process's device, the same on every process."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(shape, dtype=DTYPE)
    model.set_attn_implementation(VARLEN)
    return model.requires_grad_(False)


def loaded_base(
    shape: LlamaConfig, config: Config, accelerator: Accelerator, row: Row
) -> PreTrainedModel:
    """Let the main process write such a model, unless it is there; all load it as a run does."""
    folder = Path(config.model.path)
    if accelerator.is_main_process:
        make_checkpoint(folder, shape)
    accelerator.wait_for_everyone()
    mesh = make_mesh(config, accelerator.device, DTYPE)
    begun = time.perf_counter()
    with HostMemory() as host:
        model = load_base_model(config.model, DTYPE, accelerator.device, mesh)
    row |= {"load_seconds": time.perf_counter() - begun, **host.gib()}
    if ON_GPU:
        row["load_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["weights_gib"] = torch.cuda.memory_allocated() / 2**30
    return model


def start_trainer(
    config: Config, shape: LlamaConfig, rows: list[np.ndarray], accelerator: Accelerator, row: Row
) -> Trainer:
    """Put the trainer of a run together."""
    examples = TokenizedSet.of(
        [Tokenized(row.astype(np.int32), np.ones(len(row), dtype=bool)) for row in rows]
    )
    data = PreparedData(examples, one_per_pack(len(rows)), None, None, None, "")  # type: ignore[arg-type]
    compute_deterministically()
    if config.trainer.strategy == "fsdp2" or config.model.quantization is not None:
        base: PreTrainedModel = loaded_base(shape, config, accelerator, row)
    else:
        base = random_base(shape, accelerator.device)
    torch.manual_seed(config.trainer.seed)
    model = attach_adapter(base, config).train()
    if config.trainer.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    fusion = fuse_model(model, config, accelerator.device)
    return make_trainer(config, model, data, accelerator, fusion)


@contextmanager
def sums_left_out() -> Iterator[None]:
    """Let each process keep its own gradients."""
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *_, **__: SimpleNamespace(wait=lambda: None)
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def seconds_of(work: Any, accelerator: Accelerator) -> float:
    """Time some work that begins on all processes at once."""
    accelerator.wait_for_everyone()
    wait = torch.cuda.synchronize if ON_GPU else int
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def measure(arguments: argparse.Namespace, accelerator: Accelerator) -> Row:
    """Time steps with and without the sum of the gradients, and the sum alone."""
    num_processes, size = accelerator.num_processes, len(UNIFORM)
    shape = model_shape(arguments.shape, arguments.layers)
    max_steps = WARMUP + 2 * arguments.steps
    config = Config(
        model=model_section(arguments, arguments.shape, shape),
        data=DataConfig(
            path="random", global_batch_size=size * num_processes, micro_batch_size=size
        ),
        trainer=TrainerConfig(
            max_steps=max_steps,
            strategy=arguments.strategy,
            gradient_checkpointing=arguments.checkpointing,
        ),
    )
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, shape.vocab_size, length) for length in UNIFORM * num_processes]
    loading: Row = {}
    trainer = start_trainer(config, shape, rows, accelerator, loading)
    for _ in range(WARMUP):
        trainer.train_step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    whole, without, alone = [], [], []
    num_trained = sum(parameter.numel() for parameter in trainer.trainable.values())
    buffer = torch.zeros(num_trained, device=accelerator.device)
    for _ in range(arguments.steps):
        whole.append(seconds_of(trainer.train_step, accelerator))
        if num_processes > 1:
            with sums_left_out():
                without.append(seconds_of(trainer.train_step, accelerator))
            alone.append(seconds_of(lambda: dist.all_reduce(buffer), accelerator))
    peak = torch.cuda.max_memory_allocated() - buffer.nbytes if ON_GPU else 0
    step, step_without_sums, sum_alone = (
        max(gather_object([median(times or [0])])) for times in (whole, without, alone)
    )
    tokens = sum(UNIFORM) * num_processes
    row = {
        "benchmark": "data_parallel",
        "model": f"Llama-3.1 {arguments.shape} shape, {shape.num_hidden_layers} layers",
        "lora": "r 16, all seven linears",
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / step,
        "step_ms": step * 1e3,
        "gradient_mb": num_trained * 4 / 1e6,
        "max_memory_allocated_gib": max(gather_object([peak])) / 2**30,
        **loading,
    }
    if num_processes > 1:
        row["step_ms_without_sums"] = step_without_sums * 1e3
        row["sums_share_of_step"] = 1 - step_without_sums / step
        row["sum_alone_ms"] = sum_alone * 1e3
    return row


def loss_curve(arguments: argparse.Namespace, accelerator: Accelerator) -> Row:
    """Train the tiny model to go on counting in steps, which each sequence has its own of."""
    shape = model_shape("tiny", arguments.layers)
    config = Config(
        model=model_section(arguments, "tiny", shape),
        data=DataConfig(path="random", global_batch_size=CURVE_BATCH, micro_batch_size=1),
        optim=OptimConfig(lr=5e-3),
        trainer=TrainerConfig(max_steps=arguments.loss_curve, strategy=arguments.strategy),
    )
    rng = np.random.default_rng(0)
    starts, strides = rng.integers(0, shape.vocab_size, 512), rng.integers(1, 8, 512)
    rows = list((starts[:, None] + strides[:, None] * np.arange(128)) % shape.vocab_size)
    trainer = start_trainer(config, shape, rows, accelerator, {})
    losses = [trainer.train_step().loss for _ in range(arguments.loss_curve)]
    return {"benchmark": "loss_curve", "global_batch_size": CURVE_BATCH, "losses": losses}


def main() -> None:
    """Measure what is asked for, and keep the row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--shape", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--quantization", choices=("nf4",))
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/data_parallel"))
    parser.add_argument("--checkpointing", action="store_true", help="keep a layer's input alone")
    parser.add_argument("--loss-curve", type=int, metavar="STEPS", help="train instead of timing")
    parser.add_argument("--result", type=Path, default=RESULTS, help="file that gets the row")
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=not ON_GPU, mixed_precision="bf16" if ON_GPU else "no")
    measured = (loss_curve if arguments.loss_curve else measure)(arguments, accelerator)
    versions = ("torch", "triton", "transformers", "peft")
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "gpus": accelerator.num_processes,
        "gpus_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "strategy": arguments.strategy,
        "quantization": arguments.quantization,
        "checkpointing": arguments.checkpointing,
        **measured,
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip() or None,
        "python": platform.python_version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if ON_GPU else None,
        **{name: metadata.version(name) for name in versions},
    }
    if accelerator.is_main_process:
        print(json.dumps(row))
        with arguments.result.open("a") as file:
            file.write(json.dumps(row) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
