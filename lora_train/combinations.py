"""Options that do not combine, and values that the schema's types let through.

Told from the configuration alone: no torch, no model, no GPU.
"""

from __future__ import annotations

import re

from lora_train.config import Config


def conflicts(config: Config) -> list[str]:
    """Return one message per unusable value and per pair of options that do not combine.

    Args:
        config: a whole run; each value is already valid on its own.

    Returns:
        Messages that begin with the dotted names they are about; empty when all combine.
    """
    return [
        *_unusable_values(config),
        *_start_conflicts(config),
        *_optimizer_conflicts(config),
        *_model_conflicts(config),
        *_sharding_conflicts(config),
    ]


def _unusable_values(config: Config) -> list[str]:
    found = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config.peft, key):
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"peft.{key}: {pattern!r} is no regular expression: {error}")
    name = config.log.name or ""
    if name in (".", "..") or "/" in name:
        found.append(
            f"log.name={name}: expected the name of one folder; log.log_dir says where it lies"
        )
    return found


def _start_conflicts(config: Config) -> list[str]:
    peft, found = config.peft, []
    is_nf4 = config.model.quantization == "nf4"
    if peft.init in ("pissa", "olora") and is_nf4:
        found.append(
            f"peft.init={peft.init} with model.quantization=nf4: it takes a product out of the "
            "base weights, which nf4 would round anew; use peft.init=loftq, or no quantization"
        )
    if peft.init == "loftq" and not is_nf4:
        found.append(
            "peft.init=loftq without model.quantization=nf4: it makes up for what nf4 loses; "
            "set model.quantization=nf4, or another start"
        )
    if peft.init == "loftq" and config.model.allow_pickle:
        found.append(
            "peft.init=loftq with model.allow_pickle=true: it reads the original weights one by "
            "one, which only safetensors allow"
        )
    if peft.init == "loftq" and peft.use_dora:
        found.append(
            "peft.init=loftq with peft.use_dora=true: DoRA's magnitudes are those of the base "
            "weights, and LoftQ's start is not"
        )
    if peft.init == "orthogonal" and _odd_ranks(config):
        found.append(
            f"peft.init=orthogonal with rank {', '.join(map(str, _odd_ranks(config)))} in peft.dim "
            "or peft.rank_pattern: it pairs the rows of A, so ranks are even"
        )
    if peft.init in ("pissa", "olora", "loftq", "orthogonal") and peft.dropout > 0:
        found.append(
            f"peft.init={peft.init} with peft.dropout={peft.dropout:g}: the start is part of the "
            "base model's answer, which dropout would tear apart; set peft.dropout=0"
        )
    return found


def _optimizer_conflicts(config: Config) -> list[str]:
    optim, found = config.optim, []
    ratio = optim.loraplus_lr_ratio
    if ratio is not None and config.peft.use_dora:
        found.append(
            f"optim.loraplus_lr_ratio={ratio:g} with peft.use_dora=true: DoRA's magnitudes would "
            "be trained at B's learning rate, which is that ratio too high for them"
        )
    min_lr = optim.lr_scheduler.min_lr
    if min_lr is not None and min_lr > optim.lr:
        found.append(
            f"optim.lr_scheduler.min_lr={min_lr:g} with optim.lr={optim.lr:g}: "
            "the end is above the peak"
        )
    if min_lr is not None and optim.lr_scheduler.name != "cosine":
        found.append(
            f"optim.lr_scheduler.min_lr={min_lr:g} with optim.lr_scheduler.name="
            f"{optim.lr_scheduler.name}: only cosine ends there"
        )
    return found


def _model_conflicts(config: Config) -> list[str]:
    found = []
    saved = set(config.peft.modules_to_save)
    if config.kernels.fused == "required":
        found += [
            f"kernels.fused=required with {option}: {reason}; set kernels.fused=auto"
            for option, is_set, reason in (
                ("peft.use_dora=true", config.peft.use_dora, "DoRA runs PEFT's own forward"),
                (
                    "trainer.precision=fp32",
                    config.trainer.precision == "fp32",
                    "the kernels compute in bf16",
                ),
            )
            if is_set
        ]
    targets = config.peft.target_modules
    both = sorted(saved & set(targets)) if not isinstance(targets, str) else []
    if both:
        found.append(
            f"peft.modules_to_save and peft.target_modules both name {', '.join(both)}: "
            "a module is either trained in full or gets an adapter"
        )
    if config.model.revision is not None and config.model.path.endswith(".gguf"):
        found.append(
            f"model.revision={config.model.revision} with model.path={config.model.path}: "
            "a file has no revisions"
        )
    return found


def _sharding_conflicts(config: Config) -> list[str]:
    if config.trainer.strategy != "fsdp2":
        return []
    model, peft = config.model, config.peft
    reads_base = "it needs whole base weights, and no process has them"
    return [
        f"trainer.strategy=fsdp2 with {option}: {reason}; set {instead}"
        for option, is_set, reason, instead in (
            (
                "model.quantization=nf4",
                model.quantization == "nf4",
                "nf4 weights are not sharded",
                "trainer.strategy=ddp, which holds the quantized model on every GPU, or "
                "model.quantization=null",
            ),
            (
                f"peft.init={peft.init}",
                peft.init in ("pissa", "olora", "loftq", "eva"),
                reads_base,
                "peft.init=default, or trainer.strategy=ddp",
            ),
            (
                "peft.use_dora=true",
                peft.use_dora,
                reads_base,
                "peft.use_dora=false, or trainer.strategy=ddp",
            ),
            (
                f"peft.modules_to_save=[{','.join(peft.modules_to_save)}]",
                bool(peft.modules_to_save),
                "only adapters are trained beside a sharded base",
                "peft.modules_to_save=[], or trainer.strategy=ddp",
            ),
            (
                f"eval.num_generate={config.eval.num_generate}",
                config.eval.num_generate > 0,
                "the main process answers alone, and no process has a whole model",
                "eval.num_generate=0; `lora-train generate` answers with the finished adapter",
            ),
            (
                f"model.path={model.path}",
                model.path.endswith(".gguf"),
                "a part of a weight can only be read from safetensors",
                "model.path to the model that the file was made from, or trainer.strategy=ddp",
            ),
            (
                "model.trust_remote_code=true",
                model.trust_remote_code,
                "the layers of such a model are not known",
                "model.trust_remote_code=false, or trainer.strategy=ddp",
            ),
            (
                "model.allow_pickle=true",
                model.allow_pickle,
                "a part of a weight can only be read from safetensors",
                "model.allow_pickle=false, or trainer.strategy=ddp",
            ),
        )
        if is_set
    ]


def _odd_ranks(config: Config) -> list[int]:
    ranks = {config.peft.dim, *config.peft.rank_pattern.values()}
    return sorted(rank for rank in ranks if rank % 2)
