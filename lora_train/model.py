"""The frozen base model and its tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)

from lora_train.attention import choose_attention
from lora_train.config import ModelConfig
from lora_train.errors import UserError
from lora_train.model_source import loading_error, read_config_dict, resolve_model
from lora_train.sharding import load_sharded

logger = logging.getLogger(__name__)

# reserved tokens that models bring for padding, the most specific first
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with `model.chat_template` in place of its own template if given.

    Its padding token is never the end-of-text token where a reserved one exists. Labels are masked
    by length, so padding matters to batched generation only.

    Args:
        config: which model.

    Returns:
        The tokenizer.

    Raises:
        UserError: the model cannot be found or read, its tokenizer knows more tokens than its
            embedding has rows, or the chat template is absent or no valid Jinja.
    """
    source = resolve_model(config)
    model_config = read_config_dict(source, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise loading_error(error, config) from error
    rows = model_config.get("vocab_size")
    highest = max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        raise UserError(
            f"model.path={config.path}: the tokenizer goes up to token {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}), the embedding has {rows} rows",
            hint="the tokenizer is another model's, or tokens were added without resizing",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        reserved = [name for name in _PAD_TOKENS if name in known and name != tokenizer.eos_token]
        # without a reserved one, eos pads: batches carry an attention mask, so nothing sees it
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.eos_token
    if config.chat_template is not None:
        tokenizer.chat_template = _read_chat_template(Path(config.chat_template).expanduser())
    return tokenizer


def load_base_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """Load the base model onto the device, frozen and without a cache for earlier tokens.

    Args:
        config: which model, quantized or not, with which attention.
        dtype: type of its weights; of its arithmetic where they are nf4.
        device: where it is put; weights go there file by file, without a second copy.
        mesh: the processes that share it, see `make_mesh`; None: this one holds it whole.

    Returns:
        The model; none of its parameters requires a gradient.

    Raises:
        UserError: the model cannot be found, read or used for causal language modelling.
    """
    source = resolve_model(config)
    read_config_dict(source, config)
    try:
        model_config = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise loading_error(error, config) from error
    attention = None
    model_class = _causal_class(model_config, config)
    if model_class is not None:
        choice = choose_attention(config.attn_implementation, model_config, model_class)
        logger.info("attention %s: %s", choice.name, choice.reason)
        attention = choice.name
    if mesh is None:
        model = _load_whole(source, config, attention, dtype, device)
    else:
        # refused with the configuration: code that comes with the model
        assert attention is not None
        model = load_sharded(source, model_config, attention, config, dtype, device, mesh)
    model.requires_grad_(False)
    # with a cache, transformers does not look for packed sequences and one would see the other
    model.config.use_cache = False
    return model


def _load_whole(
    source: str,
    config: ModelConfig,
    attention: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if config.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    are_copied = device.type != "cpu" or config.quantization is not None
    try:
        with _reading_weights() if are_copied else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if config.allow_pickle else True,
                dtype=dtype,
                device_map={"": device},
                **options,
            )
    except torch.OutOfMemoryError as error:
        smaller = (
            "set model.quantization=null and trainer.strategy=fsdp2 on several GPUs"
            if config.quantization == "nf4"
            else "set model.quantization=nf4, or trainer.strategy=fsdp2 on several GPUs"
        )
        raise UserError(
            f"model.path={config.path} does not fit on {device}: {error}",
            hint=f"{smaller}, or ask Slurm for a GPU with more memory",
        ) from error
    except Exception as error:
        raise loading_error(error, config) from error
    if config.quantization == "nf4":
        _keep_nf4_differentiable(model)
    return model


@contextlib.contextmanager
def _reading_weights() -> Iterator[None]:
    """Make transformers read each weight when its turn comes, instead of mapping all files.

    It maps them until the last weight is loaded, and every page that was read counts as memory of
    this process: 141 GB at 70B, where a weight at a time takes less than one.
    """
    if not hasattr(modeling_utils, "safe_open"):
        logger.warning(
            "transformers opens files in another way than it did: the weights' files stay mapped "
            "until all are loaded, and count as memory of this process"
        )
        yield
        return

    def read(*args: Any, **kwargs: Any) -> Any:
        return safe_open(*args, **kwargs | {"backend": "pread"})

    with mock.patch.object(modeling_utils, "safe_open", read):
        yield


def describe_model(model: PreTrainedModel) -> str:
    """Return one line: class, parameters, layers, hidden size, type, attention."""
    config = model.config.get_text_config()
    quantized = getattr(model, "is_loaded_in_4bit", False)
    dtype = "nf4" if quantized else str(model.dtype).removeprefix("torch.")
    return (
        f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters, "
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {dtype}, "
        f"attention {config._attn_implementation}"
    )


def _causal_class(
    model_config: PreTrainedConfig, config: ModelConfig
) -> type[PreTrainedModel] | None:
    """Return the class that will be loaded; None for code that comes with the model."""
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    if config.trust_remote_code:
        return None
    raise UserError(
        f"model.path={config.path} is of type {model_config.model_type!r}, "
        "which is no causal language model",
        hint="choose a model that generates text",
    )


def _keep_nf4_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from re-packing the weights for a CPU kernel that has no gradient.

    On CPUs with avx512_bf16, bitsandbytes 0.50.2 re-packs a layer at its first forward in eval mode
    and never un-packs it: every later training forward is then silently cut from the graph, and a
    run that evaluates first does not learn.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _read_chat_template(file: Path) -> str:
    import jinja2

    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={file} cannot be read: {error}") from error
    try:
        # transformers' own extensions, such as {% generation %}, are no mistakes
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"model.chat_template={file}, line {error.lineno}: {error.message}",
            hint="a chat template is Jinja; compare with the model's own chat_template.jinja",
        ) from error
    return template
