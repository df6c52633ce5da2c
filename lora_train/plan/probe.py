"""Real steps of a run on the GPU at hand, without its weights and data: what they really take.

Speed and memory do not depend on values, so the weights are random and the tokens too. What runs is
the run's own code: adapter, kernels, optimizer, loop.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import bitsandbytes
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from lora_train.adapter import attach_adapter
from lora_train.assembly import make_trainer
from lora_train.attention import choose_attention
from lora_train.batch_split import gradient_accumulation_steps
from lora_train.config import Config
from lora_train.data.packing import one_per_pack
from lora_train.data.prepared import PreparedData
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import Tokenized
from lora_train.device import compute_deterministically
from lora_train.fusion import fuse_model

# one to compile and to fill the allocator, and the optimizer has no states before it
_WARMUP = 1


@dataclass(frozen=True)
class ProbeResult:
    """What steps took."""

    step_seconds: float
    """Median of those after the first."""
    max_memory_allocated_bytes: int
    """Peak of torch's tensors."""
    max_memory_reserved_bytes: int
    """Peak of what torch's allocator took from the driver."""
    device_used_bytes: int
    """What the driver reports as in use at the end, of all processes."""
    tokens: int
    """Of a step."""
    is_fused: bool
    """Whether the kernels ran the decoder as a whole."""


def probe(config: Config, model: Mapping[str, Any], *, steps: int = 2) -> ProbeResult:
    """Run steps on sequences of full length, all of whose tokens count.

    Args:
        config: the run; of its data only the sizes are read.
        model: the content of the base model's config.json.
        steps: that are timed, after one more.

    Returns:
        What they took.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    compute_deterministically()
    torch.manual_seed(config.trainer.seed)
    base = _random_base(config, model, device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    adapted = attach_adapter(base, config).train()
    if config.trainer.gradient_checkpointing is True:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    fusion = fuse_model(adapted, config, device)
    accelerator = Accelerator(mixed_precision="bf16")
    data = _random_data(config, base.config.get_text_config().vocab_size)
    trainer = make_trainer(config, adapted, data, accelerator, fusion)
    seconds = []
    for _ in range(_WARMUP + steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        result = trainer.train_step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    free, total = torch.cuda.mem_get_info()
    return ProbeResult(
        step_seconds=median(seconds[_WARMUP:]),
        max_memory_allocated_bytes=torch.cuda.max_memory_allocated(),
        max_memory_reserved_bytes=torch.cuda.max_memory_reserved(),
        device_used_bytes=total - free,
        tokens=result.tokens,
        is_fused=fusion is not None and fusion.decoder is not None,
    )


def _random_data(config: Config, vocabulary: int) -> PreparedData:
    rng = np.random.default_rng(config.trainer.seed)
    length = config.data.seq_length
    rows = rng.integers(0, vocabulary, (config.data.global_batch_size, length), dtype=np.int32)
    examples = TokenizedSet.of([Tokenized(row, np.ones(length, dtype=bool)) for row in rows])
    gradient_accumulation_steps(config, 1)
    return PreparedData(examples, one_per_pack(len(rows)), None, None, None, "")  # type: ignore[arg-type]


def _random_base(config: Config, model: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
    options = {name: value for name, value in model.items() if name not in _NOT_SIZES}
    model_config: PreTrainedConfig = AutoConfig.for_model(model["model_type"], **options)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    attention = choose_attention(config.model.attn_implementation, model_config, model_class).name
    made: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": attention}
    if config.model.quantization == "nf4":
        base = _random_nf4(model_class, model_config, made, config, device)
    else:
        with device:
            base = model_class._from_config(model_config, **made)
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


# of config.json, what `for_model` gets otherwise or must not get
_NOT_SIZES = ("model_type", "dtype", "torch_dtype", "transformers_version", "architectures")


def _random_nf4(
    model_class: type[PreTrainedModel],
    model_config: PreTrainedConfig,
    made: dict[str, Any],
    config: Config,
    device: torch.device,
) -> PreTrainedModel:
    """Quantize one random matrix after the other: the whole in bf16 might not fit."""
    with torch.device("meta"):
        base = model_class._from_config(model_config, **made)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device)
            quantized = bitsandbytes.nn.Linear4bit(
                weight.shape[1], weight.shape[0], bias=module.bias is not None,
                compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
                compress_statistics=config.model.double_quantization,
            )  # fmt: skip
            quantized.weight = bitsandbytes.nn.Params4bit(
                weight.normal_(0, 0.02), requires_grad=False, quant_type="nf4",
                compress_statistics=config.model.double_quantization,
            ).to(device)  # fmt: skip
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, quantized)
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, nn.Parameter(values.normal_(0, 0.02), requires_grad=False))
    base.tie_weights()
    with device:
        base.model.rotary_emb = type(base.model.rotary_emb)(model_config)
    base.is_loaded_in_4bit = True  # PEFT looks for it
    return base
