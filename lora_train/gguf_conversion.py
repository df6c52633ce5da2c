"""Turn a Llama-architecture GGUF file into a Hugging Face model folder.

A model that transformers loads with `gguf_file=` can be neither saved nor trained (5.23 marks it as
quantized), loses the digit splitting of its tokenizer, and may pad with its own stop token. So the
file is converted once: bf16 safetensors, config, tokenizer, chat template.

What a GGUF file can hold and this converter cannot carry over exactly is refused, never dropped.
"""

import json
import math
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.paths import atomic_folder

_MAX_SHARD_BYTES = 4 * 2**30

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# tokenizer.ggml.pre, by how the text is cut before byte-pair merges (llama.cpp's definitions)
_PRE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_PRE_LLAMA3 = {"llama3", "llama-v3", "llama-bpe"}
_PRE_PLAIN = {"gpt-2", "default"}

# the values every released Llama 3.1, 3.2 and 3.3 model uses; only the factor differs (8 or 32)
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192

# names of tokens made for padding, tried when a file names none or names its stop token
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


def gguf_to_hf(gguf_file: Path, destination: Path) -> None:
    """Convert a GGUF file of the Llama architecture to a Hugging Face model folder.

    Weights are dequantized to float32 and rounded to bf16. The folder appears whole or not at all.

    Args:
        gguf_file: a single-file GGUF; its tokenizer and chat template are converted too.
        destination: the folder to make; must be absent or empty.

    Raises:
        UserError: the file is no GGUF file, is of another architecture, is one of several parts,
            or holds something that a LlamaForCausalLM cannot (experts, biases, other rope scaling).
        OSError: the file cannot be read or the folder cannot be written.
    """
    reader = _open(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_supported(fields, gguf_file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, gguf_file)
    names = _hf_names(tensors, config["num_hidden_layers"], gguf_file)
    tokenizer = _tokenizer(fields, gguf_file)
    # one source for the padding token, so the model and the tokenizer cannot disagree
    config["pad_token_id"] = tokenizer.pad_token_id

    from transformers import GenerationConfig, LlamaConfig

    with atomic_folder(destination) as folder:
        _write_weights(tensors, names, config, folder)
        LlamaConfig(**config, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(
            folder
        )
        GenerationConfig(
            bos_token_id=config["bos_token_id"],
            eos_token_id=_stop_ids(fields),
            pad_token_id=config["pad_token_id"],
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _open(gguf_file: Path) -> Any:
    from gguf import GGUFReader

    if not gguf_file.is_file():
        raise UserError(f"no such GGUF file: {gguf_file}")
    try:
        return GGUFReader(gguf_file)
    # the reader asserts nothing: a cut or foreign file surfaces as one of these
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"cannot read {gguf_file} as GGUF: {error}") from error


def _check_supported(fields: dict[str, Any], gguf_file: Path) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{gguf_file} is of architecture {architecture!r}; only 'llama' can be converted",
            hint="train from the model's safetensors folder instead",
        )
    if fields.get("split.count", 1) > 1:
        raise UserError(
            f"{gguf_file} is part of a model split over {fields['split.count']} files",
            hint="join them with llama.cpp's `llama-gguf-split --merge`",
        )
    if fields.get("llama.expert_count", 0) > 0:
        raise UserError(f"{gguf_file} is a mixture of experts, which cannot be converted")
    if fields.get("llama.attention.sliding_window"):
        raise UserError(f"{gguf_file} uses sliding-window attention, which cannot be converted")


def _config(fields: dict[str, Any], tensors: dict[str, Any], gguf_file: Path) -> dict[str, Any]:
    """Return the keyword arguments of LlamaConfig that the file determines."""

    def required(key: str) -> Any:
        if key not in fields:
            raise UserError(f"{gguf_file} lacks the field {key}")
        return fields[key]

    if "token_embd.weight" not in tensors:
        raise UserError(f"{gguf_file} lacks the tensor token_embd.weight")
    hidden_size = required("llama.embedding_length")
    num_heads = required("llama.attention.head_count")
    head_dim = fields.get("llama.attention.key_length", hidden_size // num_heads)
    rotary_dim = fields.get("llama.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise UserError(
            f"{gguf_file} rotates {rotary_dim} of {head_dim} dimensions per head; "
            "a Llama model rotates all of them"
        )
    return {
        # GGUF writes shapes innermost first: (hidden, vocabulary)
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": required("llama.context_length"),
        "rms_norm_eps": _shortest_float32(required("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope_parameters(fields, tensors, rotary_dim, gguf_file),
        # llama.cpp writes the output matrix only when it is not the embedding
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }


def _shortest_float32(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.99999974738e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _rope_parameters(
    fields: dict[str, Any], tensors: dict[str, Any], rotary_dim: int, gguf_file: Path
) -> dict[str, Any]:
    theta = _shortest_float32(fields.get("llama.rope.freq_base", 10000.0))
    if "rope_freqs.weight" in tensors:
        return _llama3_rope(theta, tensors["rope_freqs.weight"], rotary_dim, gguf_file)
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        factor = fields.get("llama.rope.scaling.factor", 1.0)
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    raise UserError(f"{gguf_file} uses rope scaling {kind!r}; known are 'none' and 'linear'")


def _llama3_rope(theta: float, tensor: Any, rotary_dim: int, gguf_file: Path) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the divisors that llama.cpp stores in `rope_freqs`.

    The file holds one divisor per frequency, not the four numbers behind them. The largest divisor
    is the factor; the other three are the released models' own, and the divisors must then follow.
    """
    import numpy as np

    stored = np.asarray(tensor.data, dtype=np.float64).reshape(-1)
    factor = float(np.round(stored.max(), 4))
    low, high = _LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR
    frequencies = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    # 0 for wavelengths beyond the original context, 1 for short ones, linear between
    turns = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise UserError(
            f"{gguf_file} scales its rope frequencies in a way that is not Llama 3's "
            f"(original context {_LLAMA3_ORIGINAL_CONTEXT}, factor {factor:g})"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _hf_names(tensors: dict[str, Any], num_layers: int, gguf_file: Path) -> dict[str, str]:
    """Return the Hugging Face name of every tensor, keyed by its GGUF name."""
    names = dict(_OUTER_NAMES)
    for layer in range(num_layers):
        for ggml, hf in _LAYER_NAMES.items():
            names[f"blk.{layer}.{ggml}.weight"] = f"model.layers.{layer}.{hf}.weight"
    # derived data, read by _rope_parameters
    unknown = sorted(set(tensors) - set(names) - {"rope_freqs.weight"})
    if unknown:
        raise UserError(f"{gguf_file} holds tensors that a Llama model lacks: {_some(unknown)}")
    missing = sorted(set(names) - set(tensors) - {"output.weight"})
    if missing:
        raise UserError(f"{gguf_file} lacks tensors: {_some(missing)}")
    return {ggml: hf for ggml, hf in names.items() if ggml in tensors}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write_weights(
    tensors: dict[str, Any], names: dict[str, str], config: dict[str, Any], folder: Path
) -> None:
    """Write bf16 safetensors, split as transformers expects once they outgrow one shard."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name in names:
        tensor_bytes = 2 * int(tensors[name].n_elements)
        if shards[-1] and filled_bytes + tensor_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += tensor_bytes

    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weights = {names[name]: _dequantize(tensors[name], config) for name in shard}
        try:
            save_file(weights, folder / file_name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {file_name}: {error}") from error
        # save_file leaves 0600; the folder's other files follow the umask
        (folder / file_name).chmod(0o666 & folder.stat().st_mode)
        weight_map.update(dict.fromkeys(weights, file_name))
    if len(shards) > 1:
        total = 2 * sum(int(tensors[name].n_elements) for name in names)
        table = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=1) + "\n")


def _dequantize(tensor: Any, config: dict[str, Any]) -> Any:
    """Return the tensor in bf16, (out_features, in_features), in Hugging Face's row order."""
    import numpy as np
    import torch
    from gguf import dequantize

    try:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise UserError(f"tensor {tensor.name} is stored as {kind}, which is unknown") from error
    if tensor.name.endswith("attn_q.weight"):
        weight = _split_rotary_halves(weight, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        weight = _split_rotary_halves(weight, config["num_key_value_heads"])
    # float32 tensors come as views of the read-only file, which torch warns about
    return torch.from_numpy(np.require(weight, requirements=["C", "W"])).to(torch.bfloat16)


def _split_rotary_halves(weight: Any, num_heads: int) -> Any:
    # llama.cpp keeps the two numbers of a rotated pair side by side, transformers half a head apart
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _stop_ids(fields: dict[str, Any]) -> int | list[int] | None:
    """Return the ids that end an answer: end of sequence, and end of turn or message if named."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [fields.get(f"tokenizer.ggml.{key}") for key in keys]
    ids = sorted({token_id for token_id in named if token_id is not None})
    return ids if len(ids) > 1 else next(iter(ids), None)


def _tokenizer(fields: dict[str, Any], gguf_file: Path) -> Any:
    """Return a tokenizer that cuts text as llama.cpp does for this file."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pre = fields.get("tokenizer.ggml.pre", "default")
    is_byte_level = fields.get("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and pre not in _PRE_DIGITS | _PRE_LLAMA3 | _PRE_PLAIN:
        raise UserError(
            f"{gguf_file} cuts text by the unknown rule tokenizer.ggml.pre = {pre!r}; "
            "its tokens would not be the model's"
        )
    loaded = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    backend = loaded.backend_tokenizer
    if is_byte_level and pre in _PRE_DIGITS:
        from tokenizers import pre_tokenizers

        # transformers 5.23 leaves the digit rule out
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if is_byte_level and pre in _PRE_LLAMA3:
        # Llama 3 takes a word that is in the vocabulary whole, without merging up to it
        backend.model.ignore_merges = True

    tokens = fields["tokenizer.ggml.tokens"]
    # transformers adds tokens of its own, GPT-2's <|endoftext|>, that the model has no row for
    state = json.loads(backend.to_str())
    state["added_tokens"] = [each for each in state["added_tokens"] if each["id"] < len(tokens)]
    backend = Tokenizer.from_str(json.dumps(state))

    def token(key: str) -> str | None:
        token_id = fields.get(f"tokenizer.ggml.{key}")
        return None if token_id is None else tokens[token_id]

    bos = token("bos_token_id")
    # llama.cpp's own defaults where a file is silent
    starts_with_bos = not is_byte_level or pre in _PRE_LLAMA3
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", starts_with_bos):
        _prepend(backend, bos)
    # a plain fast tokenizer is read back from tokenizer.json as it stands; the class that
    # transformers picks by architecture may build another one around the vocabulary
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=token("eos_token_id"),
        unk_token=token("unknown_token_id"),
        pad_token=_pad_token(tokens, token("padding_token_id"), token("eos_token_id")),
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _pad_token(tokens: list[str], stated: str | None, eos: str | None) -> str | None:
    """Return a padding token other than the stop token, which must stay a training target."""
    candidates = [stated] if stated is not None else []
    known = set(tokens)
    candidates += [name for name in _PAD_TOKENS if name in known]
    return next((name for name in candidates if name != eos), None)


def _prepend(backend: Any, bos: str) -> None:
    from tokenizers import processors

    bos_id = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, bos_id)],
    )
