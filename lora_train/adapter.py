"""The LoRA adapter: attached to the frozen base model, saved, and attached again.

What `save_adapter` writes is a plain PEFT adapter for the original base model, whatever the start
was, in checkpoints as at the end of a run; `attach_adapter` goes on from it.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import EvaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lora_train.adapter_init import (
    ADAPTER,
    MUTATING_INITS,
    InitialFactors,
    compensate_quantization,
    lora_layers,
    split_off_factors,
    subtract_factors,
)
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.merge.base_name import portable_name
from lora_train.model_size import NEMO_NAMES
from lora_train.model_source import resolve_model

logger = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"

# about PEFT's own calls, and about arguments that need no moving
_PEFT_NOISE = (
    "`is_gradient_checkpointing` is deprecated",
    "lora with eva initialization used with low_cpu_mem_usage=False",
    "input of type <class 'int'> could not be moved",
)


@dataclass(frozen=True)
class TrainableSummary:
    """How much of the model is trained."""

    trainable: int
    """Parameters that require a gradient."""
    total: int
    """All parameters, the adapter's included; 4-bit ones counted one by one."""

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2%})"


def attach_adapter(
    model: PreTrainedModel,
    config: Config,
    *,
    calibration_batches: Iterable[dict[str, Any]] | None = None,
    resume_from: Path | None = None,
) -> PeftModel:
    """Attach a LoRA adapter; everything else stays frozen, and the adapter's weights are fp32.

    Random starts draw from torch's generator: seed it alike on every process.

    Args:
        model: the base model; PiSSA and OLoRA change its weights.
        config: the run; `peft` and `model` are read.
        calibration_batches: arguments of `model(...)` for training batches, with `labels`; needed
            by peft.init=eva, and the same on every process.
        resume_from: folder that `save_adapter` wrote; its weights are taken instead of a start.

    Returns:
        The model with its adapter; keep it, `save_adapter` needs what it knows of the start.

    Raises:
        UserError: target or rank pattern names match no module, or the start cannot be made.
    """
    init = config.peft.init
    lora_config = build_lora_config(model, config)
    if resume_from is not None and init == "eva":
        # eva moved ranks between layers
        saved = LoraConfig.from_pretrained(str(resume_from))
        for name in ("target_modules", "rank_pattern", "alpha_pattern"):
            setattr(lora_config, name, getattr(saved, name))
    if init in ("gaussian", "orthogonal", "eva") and resume_from is None:
        lora_config.init_lora_weights = init
        lora_config.eva_config = EvaConfig() if init == "eva" else None
    factors: InitialFactors = {}
    with _without_noise():
        peft_model = get_peft_model(model, lora_config)
        if resume_from is not None:
            factors = _resume(peft_model, resume_from, init)
        elif init in MUTATING_INITS:
            factors = split_off_factors(peft_model, init)
        elif init == "loftq":
            compensate_quantization(peft_model, resolve_model(config.model), config.model.revision)
        elif init == "eva":
            _initialize_eva(peft_model, calibration_batches)
    peft_model.initial_factors = factors
    _name_base(peft_model, config)
    for name, parameter in peft_model.named_parameters():
        is_adapter = "lora_" in name or "modules_to_save" in name
        assert is_adapter or not parameter.requires_grad, name
        if parameter.requires_grad:
            # AdamW's steps are smaller than bf16 can add to a weight
            parameter.data = parameter.data.float()
    return peft_model


def build_lora_config(model: PreTrainedModel, config: Config) -> LoraConfig:
    """Return PEFT's configuration of the adapter, with all names checked against the model.

    Args:
        model: the base model.
        config: the run; `peft` and `model` are read.

    Returns:
        The configuration, with PEFT's default start.

    Raises:
        UserError: a name in target_modules, rank_pattern, alpha_pattern or modules_to_save matches
            no module.
    """
    peft = config.peft
    linear_names = [name for name, part in model.named_modules() if _is_linear(part)]
    targets: str | list[str] = "all-linear"
    targeted = linear_names
    if not isinstance(peft.target_modules, str):
        targets = _resolve(peft.target_modules, linear_names, "peft.target_modules")
        targeted = [name for name in linear_names if name.endswith(tuple(targets))]
    all_names = [name for name, _ in model.named_modules() if name]
    saved = _resolve(peft.modules_to_save, all_names, "peft.modules_to_save")
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and any(_is_embedding(name) for name in targets if isinstance(targets, list)):
        raise UserError(
            "peft.target_modules names the output layer, which in this model is one matrix with "
            "the embedding: a merged adapter would change both",
            hint="leave it out, or train it in full with peft.modules_to_save=[lm_head]",
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.dim,
        lora_alpha=_number(peft.alpha),
        lora_dropout=peft.dropout,
        target_modules=targets,
        rank_pattern=_resolve_pattern(peft.rank_pattern, targeted, "peft.rank_pattern"),
        alpha_pattern=_resolve_pattern(peft.alpha_pattern, targeted, "peft.alpha_pattern"),
        modules_to_save=saved or None,
        # or lm_head would leave the embedding that it is one matrix with
        ensure_weight_tying=is_tied and any(_is_embedding(name) for name in saved),
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
        revision=config.model.revision,
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter so that plain PEFT loads it on the original base model.

    An adapter that began as PiSSA or OLoRA has twice the rank in the file.

    Args:
        model: what `attach_adapter` returned; its weights may have been trained since.
        folder: made if absent.

    Raises:
        OSError: it cannot be written.
    """
    # otherwise PEFT asks the hub whether the embedding was resized
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # a form to fill in; the finished adapter gets its own
    (folder / "README.md").unlink(missing_ok=True)
    saved = LoraConfig.from_pretrained(str(folder))
    # a loader would run the start again, and PiSSA would change its base
    saved.init_lora_weights = True
    saved.eva_config = None
    if model.initial_factors:
        weights = load_file(folder / _WEIGHTS)
        for name, (a, b) in model.initial_factors.items():
            key_a, key_b = _keys(name)
            weights[key_a] = torch.cat([weights[key_a], a])
            weights[key_b] = torch.cat([weights[key_b], -b], dim=1)
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        # scaling stays: alpha / r, or alpha / sqrt(r) with rsLoRA
        growth = 2**0.5 if saved.use_rslora else 2.0
        saved.r *= 2
        saved.lora_alpha = _number(saved.lora_alpha * growth)
        saved.rank_pattern = {name: 2 * rank for name, rank in saved.rank_pattern.items()}
        saved.alpha_pattern = {
            name: _number(alpha * growth) for name, alpha in saved.alpha_pattern.items()
        }
    # save_pretrained of the model marks it so as well
    saved.inference_mode = True
    saved.save_pretrained(str(folder))
    # save_file leaves 0600; the folder's other files follow the umask
    (folder / _WEIGHTS).chmod(0o666 & folder.stat().st_mode)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put an adapter in PEFT's format on its base model, to generate with it.

    Args:
        model: the base model as loaded.
        folder: what `save_adapter` or any other PEFT trainer wrote.

    Returns:
        The model with the adapter, nothing of it trainable.
    """
    with _without_noise():
        return PeftModel.from_pretrained(model, str(folder))


def trainable_summary(model: PeftModel) -> TrainableSummary:
    """Return how many parameters are trained, and how many there are."""
    return TrainableSummary(*model.get_nb_trainable_parameters())


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _PEFT_NOISE:
            warnings.filterwarnings("ignore", message)
        yield


def _name_base(model: PeftModel, config: Config) -> None:
    """Let the adapter name its base so that others find it, where PEFT writes this machine's path.

    Nothing here reads it: a run, and `generate`, take the base from the configuration.
    """
    commit = getattr(model.get_base_model().config, "_commit_hash", None)
    base = portable_name(config.model.path, config.model.revision, commit)
    settings = model.peft_config[ADAPTER]
    settings.base_model_name_or_path, settings.revision = base.name, base.revision
    if base.warning is not None:
        logger.warning("%s", base.warning)


def _resume(model: PeftModel, folder: Path, init: str) -> InitialFactors:
    """Load what `save_adapter` wrote, undo its widening, and return the factors of its start."""
    weights = load_file(folder / _WEIGHTS)
    factors: InitialFactors = {}
    if init in MUTATING_INITS:
        for name, layer in lora_layers(model):
            key_a, key_b = _keys(name)
            rank = layer.r[ADAPTER]
            factors[name] = (weights[key_a][rank:].clone(), -weights[key_b][:, rank:])
            weights[key_a] = weights[key_a][:rank].clone()
            weights[key_b] = weights[key_b][:, :rank].clone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # before loading: a bf16 parameter would round what the file holds in fp32
            parameter.data = parameter.data.float()
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys, result.unexpected_keys
    if factors:
        subtract_factors(model, factors)
    return factors


def _keys(name: str) -> tuple[str, str]:
    """Return the names of a layer's A and B in PEFT's file."""
    return (
        f"base_model.model.{name}.lora_A.weight",
        f"base_model.model.{name}.lora_B.weight",
    )


def _initialize_eva(model: PeftModel, calibration_batches: Iterable[dict[str, Any]] | None) -> None:
    """Start A from the directions in which the layers' inputs vary most; B stays zero."""
    assert calibration_batches is not None, "peft.init=eva needs calibration batches"
    config = model.peft_config[ADAPTER]
    # a batch with fewer tokens than components is skipped, and PEFT waits for convergence forever
    highest = max([config.r, *config.rank_pattern.values()])
    needed = round(highest * config.eva_config.rho)
    batches = [batch for batch in calibration_batches if (batch["labels"] != -100).sum() > needed]
    if not batches:
        raise UserError(
            f"peft.init=eva needs batches with more than {needed} answer tokens "
            f"(peft.dim={config.r} times {config.eva_config.rho:g}), and none has so many",
            hint="set data.micro_batch_size or data.seq_length higher, or peft.init=default",
        )
    initialize_lora_eva_weights(
        model, batches, gather_distributed_inputs=False, show_progress_bar=False
    )


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's matrix product is a class of its own
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "embed_tokens", "embed_out", "wte")


def _matches(name: str, module_names: list[str]) -> bool:
    """Whether a name is the end of a module's name, in whole parts, as PEFT matches it."""
    return any(module == name or module.endswith(f".{name}") for module in module_names)


def _resolve(names: Iterable[str], module_names: list[str], key: str) -> list[str]:
    """Return the names with NeMo's replaced, each of which matches a module."""
    resolved: list[str] = []
    for name in names:
        candidates = NEMO_NAMES.get(name, (name,))
        found = [candidate for candidate in candidates if _matches(candidate, module_names)]
        if not found:
            raise _no_match(name, module_names, key)
        resolved += [candidate for candidate in found if candidate not in resolved]
    return resolved


def _resolve_pattern(
    pattern: dict[str, Any], targeted: list[str], key: str
) -> dict[str, int | float]:
    """Return the pattern with NeMo's names replaced; each name, a regular expression, matches."""
    resolved: dict[str, int | float] = {}
    for name, value in pattern.items():
        candidates = NEMO_NAMES.get(name, (name,))
        # as PEFT matches them
        found = [
            candidate
            for candidate in candidates
            if any(re.match(rf"(.*\.)?({candidate})$", module) for module in targeted)
        ]
        if not found:
            raise _no_match(name, targeted, key)
        resolved |= dict.fromkeys(found, _number(value))
    return resolved


def _no_match(name: str, module_names: list[str], key: str) -> UserError:
    endings = sorted({module.rpartition(".")[2] for module in module_names})
    close = difflib.get_close_matches(name, endings, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]}?" if close else ""
    shown = ", ".join(ending for ending in endings if not ending.isdecimal())
    return UserError(
        f"{key}: no module of this model is named {name!r}{meant}",
        hint=f"modules that can be named: {shown}",
    )


def _number(value: float) -> int | float:
    # PEFT's files hold integers where they can; some servers read no others
    return int(value) if float(value).is_integer() else value
