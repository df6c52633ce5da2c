"""Text from a model: batches of prompts answered greedily, or one answer as it is written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lora_train.attention import generation_attention

logger = logging.getLogger(__name__)

# tokens that end a turn; many models name only their end of text as eos
_END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>",
    "<|endofturn|>", "<|end_of_text|>", "<|endoftext|>", "</s>",
)  # fmt: skip


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's, the tokenizer's, and ends of turn."""
    base = _base_model(model)
    found: set[int] = set()
    for ids in (
        base.generation_config.eos_token_id if base.generation_config else None,
        getattr(base.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if ids is not None:
            found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary[name] for name in _END_OF_TURN if name in vocabulary}
    return sorted(found)


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    """Without special tokens."""
    is_complete: bool
    """Whether it came to its end; False: cut at the longest that was allowed."""


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Answer prompts greedily, in batches of prompts of about the same length.

    Args:
        model: with its adapter as it stands; training mode and attention are as before afterwards.
        tokenizer: the model's.
        prompts: token ids, each at least one token.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at once, at least 1.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    answers = answer_prompts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return [answer.text for answer in answers]


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """As `generate_answers`, and tell of each answer whether it came to its end."""
    base = _base_model(model)
    device = base.get_input_embeddings().weight.device
    config = _config(model, tokenizer, max_new_tokens=max_new_tokens)
    # like lengths together: less padding to compute, and like answers end together
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [Answer("", True)] * len(prompts)
    stops = torch.tensor(config.eos_token_id)
    with generating(model, tokenizer):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = len(prompts[indices[-1]])
            # padded on the left: the answer continues the last column
            ids = torch.full((len(indices), width), config.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):
                ids[row, width - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
                mask[row, width - len(prompts[index]) :] = 1
            output = base.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
            written = output[:, width:].cpu()
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            ended = torch.isin(written, stops).any(dim=1).tolist()
            for index, text, has_ended in zip(indices, texts, ended, strict=True):
                answers[index] = Answer(text, has_ended)
    return answers


@torch.no_grad()
def stream_answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """Answer one prompt.

    Args:
        model: with its adapter as it stands.
        tokenizer: the model's.
        prompt: token ids, at least one.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from torch's generator.
        top_p: share of the probability that tokens are drawn from, above 0, up to 1.
        streamer: gets the tokens as they come.

    Returns:
        The answer, without special tokens.
    """
    base = _base_model(model)
    ids = torch.tensor([list(prompt)], device=base.get_input_embeddings().weight.device)
    options: dict[str, Any] = {}
    if temperature > 0:
        # transformers keeps the 50 likeliest unless told otherwise
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = _config(model, tokenizer, max_new_tokens=max_new_tokens, **options)
    with generating(model, tokenizer):
        output = base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@contextlib.contextmanager
def generating(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[PreTrainedModel]:
    """Inside the block: eval mode, sdpa with a cache; of the model's defaults only its stops.

    Args:
        model: with its adapter as it stands.
        tokenizer: the model's.

    Yields:
        The model to call `generate` of, with the adapter in its layers.
    """
    base = _base_model(model)
    own_config, was_training = base.generation_config, model.training
    # sampling and repetition penalties that a model recommends would make greedy answers other ones
    base.generation_config = _config(model, tokenizer)
    model.eval()
    # the adapter is fp32 beside a bf16 model
    dtype = base.config.dtype or torch.float32
    device_type = base.get_input_embeddings().weight.device.type
    try:
        with (
            generation_attention(model),
            torch.autocast(device_type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            yield base
    finally:
        base.generation_config = own_config
        model.train(was_training)


def _config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> GenerationConfig:
    stops = stop_ids(model, tokenizer)
    # what pads a finished row is never read
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        eos_token_id=stops, pad_token_id=pad, use_cache=True, **{"do_sample": False, **options}
    )


def _base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    # the adapter's layers are inside it; generating through PeftModel changes its configuration
    return model.get_base_model() if isinstance(model, PeftModel) else model
