"""A model built like Llama written as one GGUF file, and read back and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lora_train.errors import RunError, UserError
from lora_train.evaluation.progress import Countdown
from lora_train.merge.folder import read_json
from lora_train.merge.gguf_fields import (
    add_shape,
    add_tokenizer,
    architecture,
    gguf_tokenizer,
    rope_divisors,
)
from lora_train.merge.plan import is_tied
from lora_train.merge.tensor_files import StoredTensor, read_folder
from lora_train.merge.weights import read_rows

_BLOCK_ELEMENTS = 8 * 2**20
# the largest error of rounding, relative to the largest number that shares its exponent or scale
_TOLERANCE = {"bf16": 2**-8, "f16": 2**-11, "f32": 0.0, "q8_0": 1 / 127}


def write_gguf(folder: Path, file: Path, kind: str, name: str, tokenizer: Any) -> None:
    """Write a model as a GGUF file, and compare what is read back.

    Args:
        folder: of the model, in Hugging Face's format.
        file: to be made.
        kind: one of `GGUF_KINDS`.
        name: of the model.
        tokenizer: of the model, with its chat template.

    Raises:
        UserError: it is of an architecture or with a tokenizer that is not written here.
        RunError: a tensor reads back differently, or does not fit into the type.
        OSError: the disk is full.
    """
    import gguf

    config = read_json(folder / "config.json")
    writer = gguf.GGUFWriter(file, architecture(config))
    writer.add_name(name)
    add_shape(writer, config)
    file_type = {
        "bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16,
        "f32": gguf.LlamaFileType.ALL_F32, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }[kind]  # fmt: skip
    writer.add_file_type(file_type)
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, gguf_tokenizer(folder, tokenizer, int(config["vocab_size"])))
    tensors = list(_named(folder, config))
    factors = rope_divisors(config)
    if factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes,
            raw_dtype=gguf.GGMLQuantizationType.F32,
        )  # fmt: skip
    for gguf_name, tensor, _ in tensors:
        stored = _stored_kind(kind, tensor)
        quantization = gguf.GGMLQuantizationType[stored.upper()]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, quantization)
        writer.add_tensor_info(
            gguf_name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    console = Console(stderr=True)
    with Countdown(console, "writing GGUF, tensors", total=len(tensors), done=0) as progress:
        for _, tensor, heads in tensors:
            writer.write_tensor_data(_encoded(tensor, heads, _stored_kind(kind, tensor)))
            progress.advance(1)
    writer.close()
    _check(file, tensors, kind)


def _named(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, StoredTensor, int]]:
    """Yield each tensor with its GGUF name, and the heads whose rows are reordered (0: none)."""
    import gguf

    arch = architecture(config)
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"])
    reordered = {
        "q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads),
    } if arch == "llama" else {}  # fmt: skip
    tensors = read_folder(folder)
    tied = is_tied(tensors, config)
    for name, tensor in tensors.items():
        if tied and name == "lm_head.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"{tensor.file} holds {name}, which {arch} does not have in GGUF")
        yield gguf_name, tensor, reordered.get(name.split(".")[-2], 0)


def _stored_kind(kind: str, tensor: StoredTensor) -> str:
    """Return the type of one tensor: as llama.cpp has it, vectors stay fp32."""
    if len(tensor.shape) == 1:
        return "f32"
    # a block of Q8_0 is 32 numbers of a row
    return "f16" if kind == "q8_0" and tensor.shape[-1] % 32 else kind


def _encoded(tensor: StoredTensor, num_heads: int, kind: str) -> np.ndarray:
    """Return a tensor as GGUF holds it: bytes, (rows, bytes of a row)."""
    import gguf

    quantization = gguf.GGMLQuantizationType[kind.upper()]
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, quantization)
    num_rows = tensor.shape[0]
    if len(tensor.shape) == 1:
        rows = read_rows(tensor, 0, num_rows)
        if num_heads:  # a bias
            rows = torch.from_numpy(_pair_rotary(rows.float().numpy(), num_heads))
        return _encode_rows(rows, kind, tensor.name)
    encoded = np.empty(shape, dtype=np.uint8)
    step = max(1, _BLOCK_ELEMENTS // tensor.shape[1])
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        rows = read_rows(tensor, begin, end)
        encoded[begin:end] = _encode_rows(rows, kind, tensor.name)
    return _pair_rotary(encoded, num_heads) if num_heads else encoded


def _encode_rows(rows: torch.Tensor, kind: str, name: str) -> np.ndarray:
    import gguf

    if kind == "bf16":
        return rows.to(torch.bfloat16).view(torch.uint8).numpy()
    values = rows.float()
    if kind == "q8_0":
        return gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    if kind == "f16":
        values = values.half()
        if not values.isfinite().all():
            raise RunError(f"{name} does not fit into f16", hint="--gguf bf16")
    return values.view(torch.uint8).numpy()


def _pair_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    # transformers keeps the two numbers of a rotated pair half a head apart, llama.cpp side by side
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _check(file: Path, tensors: list[tuple[str, StoredTensor, int]], kind: str) -> None:
    """Read the file back and compare every tensor with the one it was made from."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, tensor, heads in tensors:
        stored = _stored_kind(kind, tensor)
        data = found[name]
        width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        step = max(1, _BLOCK_ELEMENTS // width)
        # rows of one head belong together
        head = tensor.shape[0] // heads if heads else 1
        step = max(head, step // head * head)
        for begin in range(0, tensor.shape[0], step):
            end = min(begin + step, tensor.shape[0])
            values = gguf.dequantize(np.asarray(data.data[begin:end]), data.tensor_type)
            expected = read_rows(tensor, begin, end).float().numpy()
            if heads:
                expected = _pair_rotary(expected, (end - begin) // head)
            values = values.reshape(expected.shape)
            scale = (
                np.abs(expected).max(-1, keepdims=True) if stored == "q8_0" else np.abs(expected)
            )
            # f16's smallest numbers are 6e-8 apart
            if not (np.abs(values - expected) <= _TOLERANCE[stored] * scale + 6e-8).all():
                raise RunError(f"{file.name}: {name} does not read back as it was written")
