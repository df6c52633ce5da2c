"""Training steps of Llama-3.1-8B's shape on one GPU: lora-train beside its peers.

    python kernels/benchmarks/benchmark_training_step.py [--steps 12] [--only "fused;liger"]

Random weights and tokens (speed and memory do not depend on their values); every step is forward,
loss on all tokens, backward, gradient clipping and AdamW. Prints a table and appends one JSON row
per variant to results/training_step.jsonl. All variants run in this one process, on the same base
weights. Nothing is measured if the kernels' own check against torch fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
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

from lora_kernels.augmented import AdaptedLinear, AugmentedGroup
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import DecoderLayer, Sequences
from lora_kernels.peft_bridge import fuse
from lora_train.adapter import attach_adapter
from lora_train.assembly import make_trainer
from lora_train.attention import VARLEN
from lora_train.config import Config, DataConfig, ModelConfig, PeftConfig, TrainerConfig
from lora_train.data.packing import one_per_pack
from lora_train.data.prepared import PreparedData
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import Tokenized
from lora_train.device import compute_deterministically

RESULTS = Path(__file__).parent / "results" / "training_step.jsonl"
# steps that are not timed: the first compiles and fills the allocator
WARMUP = 3
UNIFORM = (2048,) * 4
# 16 sequences, 8192 tokens
MIXED = (2048, 1024, 1024, 768, 640, 512, 512, 384, 320, 256, 192, 160, 128, 96, 72, 56)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Result = dict[str, Any]


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
        use_cache=False,
    )  # fmt: skip


def random_model(num_layers: int) -> LlamaForCausalLM:
    """A model of that shape on the GPU, always the same, frozen."""
    shape = llama31_8b()
    shape.num_hidden_layers = num_layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def timed(steps: int, step: Callable[[], float]) -> Result:
    """Run the steps; median time of those after the warm-up, their kernels' time, peak memory."""
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
    peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    # copies to and from host memory run beside the kernels
    kernels = sum(
        event.self_device_time_total
        for event in profile.key_averages()
        if not event.key.startswith(("Memcpy HtoD", "Memcpy DtoH"))
    )
    return {
        "step_seconds_median": median(seconds[WARMUP:]),
        "step_seconds_min": min(seconds[WARMUP:]),
        "kernel_seconds": kernels / 1e6,
        "max_memory_allocated_gib": peak / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def ours(
    base: LlamaForCausalLM,
    steps: int,
    *,
    lengths: tuple[int, ...] = UNIFORM,
    rank: int = 16,
    dropout: float = 0.0,
    checkpointing: bool = False,
    fused: bool = True,
) -> Result:
    """lora-train's own loop: one padding-free row, fp32 adapters, bf16 autocast."""
    base.set_attn_implementation(VARLEN)
    config = Config(
        model=ModelConfig(path="random"),
        data=DataConfig(
            path="random", global_batch_size=len(lengths), micro_batch_size=len(lengths)
        ),
        peft=PeftConfig(dim=rank, alpha=2.0 * rank, dropout=dropout),
        trainer=TrainerConfig(max_steps=steps + 1),
    )
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, base.config.vocab_size, length) for length in lengths]
    examples = TokenizedSet.of(
        [Tokenized(row.astype(np.int32), np.ones(len(row), dtype=bool)) for row in rows]
    )
    packs = one_per_pack(len(examples))
    data = PreparedData(examples, packs, None, None, None, "")  # type: ignore[arg-type]
    compute_deterministically()
    model = attach_adapter(base, config)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    fusion = fuse(model) if fused else None
    if fusion is not None:
        check = fusion.self_check()
        if check is None or check.failures:
            sys.exit(f"the kernels are wrong on this GPU, nothing is measured: {check}")
    trainer = make_trainer(config, model, data, Accelerator(mixed_precision="bf16"), fusion)
    result = timed(steps, lambda: trainer.train_step().loss)
    if fusion is not None:
        fusion.undo()
    if checkpointing:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
    model.unload()
    torch.use_deterministic_algorithms(False)
    return result | {"tokens_per_step": sum(lengths), "sequences": len(lengths)}


def our_frozen(base: LlamaForCausalLM, steps: int) -> Result:
    """Our kernels without any adapter: forward, loss, and the gradient of the embedded tokens."""
    layers = []
    for index, layer in enumerate(base.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        groups = [
            AugmentedGroup(
                [AdaptedLinear(part.weight.data) for part in parts], torch.bfloat16, base.device
            )
            for parts in (
                (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
            )
        ]  # fmt: skip
        layers.append(
            DecoderLayer(
                index, *groups, layer.input_layernorm.weight.data,
                layer.post_attention_layernorm.weight.data, 1e-5, 32, 8, 128, 128**-0.5,
            )
        )  # fmt: skip
    stack = DecoderStack(layers, base.model.norm.weight.data, 1e-5)
    ids, sequences = _uniform_batch(base)
    rows = torch.arange(len(ids), device="cuda").view(4, -1)[:, :-1].flatten()

    def step() -> float:
        hidden = base.model.embed_tokens(ids).detach().requires_grad_()
        out = stack(hidden, sequences, rows=rows)
        loss = linear_cross_entropy(out, base.lm_head.weight, ids[rows + 1]) / len(rows)
        loss.backward()
        return loss.item()

    return timed(steps, step)


def _uniform_batch(base: LlamaForCausalLM) -> tuple[torch.Tensor, Sequences]:
    ids = torch.randint(0, base.config.vocab_size, (sum(UNIFORM),), device="cuda")
    positions = torch.arange(UNIFORM[0], device="cuda")[None]
    cos, sin = base.model.rotary_emb(torch.empty(0, device="cuda"), positions)
    cos, sin = (half[0, :, :64].repeat(4, 1).contiguous() for half in (cos, sin))
    borders = torch.arange(0, 8193, 2048, dtype=torch.int32, device="cuda")
    return ids, Sequences(cos, sin, borders, 2048)


def stock(
    base: LlamaForCausalLM,
    steps: int,
    *,
    autocast: bool = False,
    bf16_adapters: bool = False,
    lora: bool = True,
    checkpointing: bool = False,
) -> Result:
    """Plain transformers + PEFT: sdpa and the model's own loss (Liger's where it is applied)."""
    base.set_attn_implementation("sdpa")
    model: Any = base
    parameters: list[torch.nn.Parameter] = []
    if lora:
        config = LoraConfig(
            r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=LINEARS
        )  # fmt: skip
        model = get_peft_model(base, config, autocast_adapter_dtype=not bf16_adapters)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    else:
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    ids = torch.randint(0, base.config.vocab_size, (4, UNIFORM[0]), device="cuda")

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if lora:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    result = timed(steps, step)
    if checkpointing:
        model.gradient_checkpointing_disable()
    if checkpointing or not lora:
        model.disable_input_require_grads()
    if lora:
        model.unload()
    return result


class Base:
    """The frozen model that the variants share."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._has_liger = False
        self.model = random_model(num_layers)

    def with_liger(self) -> LlamaForCausalLM:
        """Begin anew with Liger's kernels in the model; what they change in it stays changed."""
        if self._has_liger:
            return self.model
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        self._has_liger = True
        del self.model
        gc.collect()
        torch.cuda.empty_cache()
        self.model = random_model(self._num_layers)
        apply_liger_kernel_to_llama(model=self.model)
        return self.model


def in_nf4(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Quantize the decoder's linears in place, as loading with bitsandbytes does; for good."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in base.model.layers:
        for name in LINEARS:
            parent = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
            weight = getattr(parent, name).weight.data
            quantized = Linear4bit(
                weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16,
                quant_type="nf4", compress_statistics=True, device="meta",
            )  # fmt: skip
            quantized.weight = Params4bit(
                weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cuda")
            setattr(parent, name, quantized)
    base.is_loaded_in_4bit = True  # PEFT looks for it
    base.requires_grad_(False)
    return base


def variants(base: Base, steps: int) -> dict[str, Callable[[], Result]]:
    """What is measured, in order: what changes the base model for good comes last."""
    few = max(WARMUP + 3, steps // 2)
    return {
        "fused": lambda: ours(base.model, steps),
        "fused, dropout 0.1": lambda: ours(base.model, steps, dropout=0.1),
        "fused, rank 64": lambda: ours(base.model, few, rank=64),
        "fused, 16 mixed sequences": lambda: ours(base.model, few, lengths=MIXED),
        "fused, checkpointing": lambda: ours(base.model, few, checkpointing=True),
        "fused, checkpointing, 8 x 2048": lambda: ours(
            base.model, few, checkpointing=True, lengths=UNIFORM * 2
        ),
        "frozen, our kernels": lambda: our_frozen(base.model, steps),
        "kernels.fused=off": lambda: ours(base.model, few, fused=False),
        "stock PEFT": lambda: stock(base.model, few),
        "stock PEFT, bf16 autocast": lambda: stock(base.model, few, autocast=True),
        "stock PEFT, bf16 adapters": lambda: stock(base.model, few, bf16_adapters=True),
        "fused, again": lambda: ours(base.model, steps),
        "fused, nf4": lambda: ours(in_nf4(base.model), few),
        "fused, nf4, checkpointing": lambda: ours(base.model, few, checkpointing=True),
        "liger + PEFT, bf16 adapters": lambda: stock(base.with_liger(), steps, bf16_adapters=True),
        "liger + PEFT, bf16 adapters, checkpointing": lambda: stock(
            base.with_liger(), few, bf16_adapters=True, checkpointing=True
        ),
        "liger, frozen without LoRA": lambda: stock(base.with_liger(), steps, lora=False),
    }


def main() -> None:
    """Measure every variant and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per variant")
    parser.add_argument("--only", default="", help="parts of names, between semicolons")
    parser.add_argument("--layers", type=int, default=32, help="fewer than 32 for a small GPU")
    arguments = parser.parse_args()
    base = Base(arguments.layers)
    wanted = [word.strip() for word in arguments.only.split(";")]
    chosen = {
        name: measure
        for name, measure in variants(base, arguments.steps).items()
        if any(word in name for word in wanted)
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
        "tokens_per_step": sum(UNIFORM),
        "sequences": len(UNIFORM),
        "commit": commit or None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "triton", "transformers", "peft")},
        "liger_kernel": metadata.version("liger_kernel"),
    }
    print(f"{common['gpu']}: {common['model']}")
    for name, measure in chosen.items():
        try:
            result = measure()
        except torch.OutOfMemoryError:
            print(f"{name:44} out of memory", flush=True)
            continue
        row = {**common, "variant": name, **result}
        row["tokens_per_second"] = row["tokens_per_step"] / row["step_seconds_median"]
        print(
            f"{name:44} {row['tokens_per_second']:8,.0f} tok/s "
            f"{row['max_memory_allocated_gib']:6.1f} GiB  "
            f"kernels {row['kernel_seconds'] / row['step_seconds_median']:.3f} of the time",
            flush=True,
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
