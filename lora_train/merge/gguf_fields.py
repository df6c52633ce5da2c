"""What a GGUF file tells of a model besides its tensors: shape, rotary frequencies, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_train.errors import UserError
from lora_train.merge.folder import read_json

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def architecture(config: Mapping[str, Any]) -> str:
    """Look up llama.cpp's name of a model's architecture.

    Args:
        config: its config.json.

    Returns:
        The name.

    Raises:
        UserError: it is none that is written here.
    """
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"a model of type {kind!r} is not written to GGUF here; "
            f"{', '.join(_ARCHITECTURES)} are",
            hint="LLAMA_CPP_DIR=FOLDER of a llama.cpp checkout: its converter knows more",
        )
    return _ARCHITECTURES[kind]


def add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    """Add the numbers that a model is built by.

    Args:
        writer: a gguf.GGUFWriter.
        config: the model's config.json.
    """
    heads = int(config["num_attention_heads"])
    head = _head_dim(config)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head)
    rope = _rope_parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    """Add the fields tokenizer.*.

    Args:
        writer: a gguf.GGUFWriter.
        tokenizer: what they hold.
    """
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types(list(tokenizer.token_types))
    if tokenizer.scores is not None:
        writer.add_token_scores(list(tokenizer.scores))
    elif tokenizer.merges:
        writer.add_token_merges(list(tokenizer.merges))
    for name, index in tokenizer.ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _head_dim(config: Mapping[str, Any]) -> int:
    head = config.get("head_dim")
    if head is None and config.get("model_type") == "qwen3":
        return 128
    return int(head or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    rope = {**old, **(config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def rope_divisors(config: Mapping[str, Any]) -> np.ndarray | None:
    """Return what Llama 3 divides its rotary frequencies by; None where there is nothing.

    Args:
        config: the model's config.json.

    Returns:
        (head dimension / 2,) fp32.

    Raises:
        UserError: frequencies are scaled in a way that is not written here.
    """
    rope = _rope_parameters(config)
    if rope["rope_type"] in ("default", "linear", "yarn"):
        return None
    if rope["rope_type"] != "llama3":
        raise UserError(
            f"rope scaling {rope['rope_type']!r} is not written to GGUF here",
            hint="LLAMA_CPP_DIR=FOLDER of a llama.cpp checkout: its converter knows more",
        )
    head = _head_dim(config)
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, head, 2) / head)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    # 0 for wavelengths beyond the original context, 1 for short ones, linear between
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


# how a text is cut before byte-pair merges, by tokenizer.ggml.pre; llama.cpp knows a tokenizer by
# what it makes of a test string, which these expressions determine
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_OF_REGEX = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """The fields tokenizer.ggml.*, without their prefix."""

    model: str
    """gpt2: byte-level BPE; llama: BPE of SentencePiece."""
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...] | None
    """Of SentencePiece's tokens: higher is merged first."""
    ids: Mapping[str, int]
    """bos, eos, unk, pad, eot: those there are."""
    add_bos: bool
    chat_template: str | None


def gguf_tokenizer(folder: Path, tokenizer: Any, num_tokens: int) -> GgufTokenizer:
    """Read a tokenizer.

    Args:
        folder: its tokenizer.json and the model's generation_config.json are read.
        tokenizer: the same, loaded.
        num_tokens: rows of the model's embedding.

    Returns:
        Its fields.

    Raises:
        UserError: it is none that this writes exactly.
    """
    file = folder / "tokenizer.json"
    content = read_json(file)
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise _unknown(file, f"a {model.get('type', 'tokenizer without tokenizer.json')}")
    is_byte_level = not model.get("byte_fallback")
    tokens: dict[int, str] = {index: token for token, index in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    tokens |= {index: entry["content"] for index, entry in added.items()}
    if max(tokens) >= num_tokens:
        raise UserError(f"{file} knows {max(tokens) + 1} tokens, the model has {num_tokens}")
    ids = _ids(tokenizer, folder)
    first = tokenizer("a").input_ids[0]
    return GgufTokenizer(
        model="gpt2" if is_byte_level else "llama",
        pre=_pre(file, content) if is_byte_level else "default",
        tokens=tuple(tokens.get(index, f"[PAD{index}]") for index in range(num_tokens)),
        token_types=tuple(
            _type(tokens.get(index), added.get(index), ids.get("unk") == index, is_byte_level)
            for index in range(num_tokens)
        ),
        merges=tuple(
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ),
        # SentencePiece's BPE numbers its tokens in the order of their merges
        scores=None if is_byte_level else tuple(-float(index) for index in range(num_tokens)),
        ids=ids,
        add_bos=ids.get("bos") == first,
        chat_template=tokenizer.chat_template,
    )


def _pre(file: Path, content: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how the text is cut before merging."""
    cutter = content.get("pre_tokenizer") or {}
    parts = cutter.get("pretokenizers", [cutter])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated":
        pre = _PRE_OF_REGEX.get(parts[0]["pattern"].get("Regex", ""))
        # llama.cpp takes a word of Llama 3's vocabulary whole, and no other's
        whole_words = bool(content["model"].get("ignore_merges"))
        if pre is not None and whole_words == (pre == "llama-bpe"):
            return pre
    raise _unknown(file, f"cutting text by {json.dumps(cutter)[:200]}")


def _type(token: str | None, added: Any, is_unknown: bool, is_byte_level: bool) -> int:
    from gguf import TokenType

    if token is None:
        return int(TokenType.UNUSED)
    if is_unknown and not is_byte_level:
        return int(TokenType.UNKNOWN)
    if added is not None:
        return int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    is_byte = not is_byte_level and len(token) == 6 and token.startswith("<0x")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _ids(tokenizer: Any, folder: Path) -> dict[str, int]:
    ids = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")
    }  # fmt: skip
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    others = [each for each in stops if each != ids["eos"]] if isinstance(stops, list) else []
    # llama.cpp has one end of turn beside the end of text, and finds further ones by their names
    ids["eot"] = others[0] if others else None
    return {name: int(index) for name, index in ids.items() if index is not None}


def _unknown(file: Path, what: str) -> UserError:
    return UserError(
        f"{file}: {what} cannot be written to GGUF here: llama.cpp would cut text another way",
        hint="LLAMA_CPP_DIR=FOLDER of a llama.cpp checkout: its convert_hf_to_gguf.py knows more",
    )
