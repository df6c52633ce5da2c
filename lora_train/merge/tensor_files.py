"""safetensors files read and written tensor by tensor: memory does not grow with the model.

A file is the length of a JSON header (8 bytes, little endian), the header, and the tensors' bytes.
`safetensors.save_file` wants all tensors of a file in memory; the format does not. Imports no
torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.errors import UserError

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of an element, by the format's name of its type."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types that a sum can be written in."""

_MAX_SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 16 * 2**20
# the format allows 100 MB; more is not a header
_MAX_HEADER_BYTES = 100 * 10**6


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    name: str
    dtype: str
    """The format's name of the type, such as BF16."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Where its bytes begin in the file."""
    num_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """Read its bytes in pieces of at most 16 MiB.

        Yields:
            The pieces, in order.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            left = self.num_bytes
            while left:
                piece = stream.read(min(left, _CHUNK_BYTES))
                if not piece:
                    raise UserError(f"{self.file} ends in the middle of {self.name}")
                left -= len(piece)
                yield piece


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    """The format's name of the type, such as BF16."""
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]
    """Makes its bytes, in order."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file holds, without its tensors.

    Args:
        file: the file.

    Returns:
        Its tensors by name, in the order of their bytes.

    Raises:
        UserError: it cannot be read, is none, or was cut short.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes")
            header = dict(json.loads(stream.read(length)))
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, file, 8 + length) for name, entry in header.items()]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise UserError(
            f"{file} is no safetensors file: {error}", hint="fetch or copy it again"
        ) from error
    tensors.sort(key=lambda tensor: tensor.start)
    if tensors and tensors[-1].start + tensors[-1].num_bytes > size:
        raise UserError(
            f"{file} was cut short: {size:,} bytes, its header tells of "
            f"{tensors[-1].start + tensors[-1].num_bytes:,}",
            hint="fetch or copy it again",
        )
    return {tensor.name: tensor for tensor in tensors}


def _stored(name: str, entry: Any, file: Path, data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(int(extent) for extent in entry["shape"]), str(entry["dtype"])
    element = DTYPE_BYTES.get(dtype)
    if element is not None and math.prod(shape) * element != end - begin:
        raise ValueError(f"{name} is {shape} of {dtype} in {end - begin} bytes")
    return StoredTensor(name, dtype, shape, file, data_start + begin, end - begin)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Read what the safetensors files of a model folder hold.

    Args:
        folder: a Hugging Face folder.

    Returns:
        All tensors by name, file by file.

    Raises:
        UserError: there are none, a file of the index is absent, or one cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= read_header(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Find the files that transformers loads of a model folder.

    Args:
        folder: a Hugging Face folder.

    Returns:
        The files, in the order of their names.

    Raises:
        UserError: there are none, or a file of the index is absent.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    # where both are there, transformers takes the one file
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"cannot read {index}: {error}", hint="fetch it again") from error
        names = sorted(set(weight_map.values()))
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing == ["model.safetensors"]:
        pickled = sorted(folder.glob("*.bin"))
        what = f"only pickled weights ({pickled[0].name})" if pickled else "no model.safetensors"
        raise UserError(
            f"{folder} has {what}: weights are merged tensor by tensor from safetensors",
            hint="AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes "
            "them; then --base NEW_FOLDER",
        )
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} names",
            hint="was the download cut short? fetch the model again",
        )
    return files


def write_model(tensors: Sequence[NewTensor], folder: Path, report: Callable[[int], None]) -> None:
    """Write tensors as a model's safetensors, in files of at most 5 GB (or one tensor).

    Args:
        tensors: what to write, in this order.
        folder: where to.
        report: called with 1 when a tensor is written.

    Raises:
        OSError: the disk is full, or not writable.
    """
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        filled = sum(each.num_bytes for each in shards[-1])
        if shards[-1] and filled + tensor.num_bytes > _MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, folder / name, report)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        table = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=1) + "\n")


def _write_file(tensors: Sequence[NewTensor], file: Path, report: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            before = stream.tell()
            for piece in tensor.pieces():
                stream.write(piece)
            assert stream.tell() - before == tensor.num_bytes, tensor.name
            report(1)
        stream.flush()
        # the folder's renaming must not reach the disk before what is in it
        os.fsync(stream.fileno())
