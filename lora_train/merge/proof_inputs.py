"""What a comparison needs, found before anything is written: rows, a device, room for a model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from lora_train.config import Config
from lora_train.data.batches import Batch, collate
from lora_train.data.packing import one_per_pack
from lora_train.data.prepared import prepare_data
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.device import describe_device, select_device
from lora_train.errors import UserError

logger = logging.getLogger(__name__)

# of the logits that are kept; with more positions, each second (third, ...) is looked at
_MAX_LOGITS_BYTES = 2**30
# Python with torch and transformers, activations of a row, and what the allocator holds back
_OVERHEAD_BYTES = 2 * 2**30
_PROC = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ProofInputs:
    """Some examples, which of their supervised positions are looked at, and the arithmetic."""

    examples: TokenizedSet
    num_rows: int
    """The first so many of them."""
    source: str
    """Where they come from, for messages."""
    num_supervised: int
    """Supervised positions of these rows."""
    stride: int
    """Of these positions each so-many-th is kept, counted over all rows."""
    dtype: torch.dtype
    """fp32 where a model fits in it, else bf16."""
    device: torch.device

    def batches(self) -> Iterator[Batch]:
        """Lay out the rows one by one.

        Yields:
            Each row with a position that is kept, on the CPU.
        """
        packs = one_per_pack(self.num_rows)
        seen = 0
        for row in range(self.num_rows):
            batch = collate(self.examples, packs, [row])
            places = torch.arange(seen, seen + len(batch.predicting))
            seen += len(batch.predicting)
            kept = batch.predicting[places % self.stride == 0]
            if len(kept):
                yield dataclasses.replace(batch, predicting=kept)


def find_proof_inputs(
    config: Config,
    tokenizer: Any,
    file: Path | None,
    most: int,
    *,
    max_positions: int | None,
    num_parameters: int,
    vocabulary: int,
    num_kept: int,
) -> ProofInputs:
    """Read the rows to compare on, and see whether the model fits.

    Args:
        config: the run.
        tokenizer: with the run's chat template.
        file: rows in any form that training takes; None: the run's own validation split.
        most: rows.
        max_positions: longest sequence that the model takes, in tokens.
        num_parameters: of the model with its adapter.
        vocabulary: logits of a position.
        num_kept: models whose logits are kept until the merged one answers.

    Returns:
        The first rows, or training rows (which is logged) where a run held none out.

    Raises:
        UserError: they cannot be read or have nothing supervised, or no arithmetic fits.
    """
    examples, source = _rows(config, tokenizer, file, max_positions)
    num_rows = min(most, len(examples))
    packs = one_per_pack(num_rows)
    supervised = sum(collate(examples, packs, [row]).num_supervised for row in range(num_rows))
    if supervised == 0:
        raise UserError(f"{source}: nothing supervised in the first {num_rows} rows")
    device = select_device()
    dtype = _choose_dtype(num_parameters, num_kept * _MAX_LOGITS_BYTES, device)
    positions = max(1, _MAX_LOGITS_BYTES // (vocabulary * dtype.itemsize))
    stride = -(-supervised // positions)
    return ProofInputs(examples, num_rows, source, supervised, stride, dtype, device)


def _rows(
    config: Config, tokenizer: Any, file: Path | None, max_positions: int | None
) -> tuple[TokenizedSet, str]:
    """Return the tokenized rows, and where they come from."""
    if file is not None and not file.is_file():
        raise UserError(f"--proof-data {file}: no such file")
    data = config.data
    if file is not None:
        # alone: what the run trained on need not be here any more
        data = dataclasses.replace(
            data, path=str(file), validation_path=None, validation_split=None, validation_size=0.0,
            train_split="train", subset=None, revision=None, format="auto", overlong="drop",
        )  # fmt: skip
    try:
        prepared = prepare_data(
            dataclasses.replace(config, data=data), tokenizer, max_positions=max_positions
        )
    except UserError as error:
        if file is not None:
            raise
        raise UserError(
            f"the run's own rows, to compare the merged model on: {error.message}",
            hint="--proof-data FILE takes other rows, --no-proof merges without a comparison",
        ) from error
    if file is not None:
        return prepared.train, str(file)
    if prepared.validation is not None:
        return prepared.validation, "the run's validation split"
    source = "rows that the run was trained on"
    logger.warning("the run held no rows out: comparing on %s", source)
    return prepared.train, source


def _choose_dtype(num_parameters: int, logits_bytes: int, device: torch.device) -> torch.dtype:
    """Return fp32 where it fits, else bf16."""
    is_cpu = device.type == "cpu"
    free = available_host_bytes() if is_cpu else torch.cuda.mem_get_info(device)[0]
    beside = _OVERHEAD_BYTES + (logits_bytes if is_cpu else 0)
    for dtype in (torch.float32, torch.bfloat16):
        if num_parameters * dtype.itemsize + beside <= free:
            return dtype
    raise UserError(
        f"the proof needs {(2 * num_parameters + beside) / 2**30:,.0f} GiB for a model in bf16, "
        f"{describe_device(device)} has {free / 2**30:,.0f} GiB free",
        hint="run it where the model fits (a GPU, or more --mem), or --no-proof merges without a "
        "comparison and says so in merge_proof.json",
    )


def available_host_bytes() -> int:
    """Return the host memory that this process can still take, its job's limit included."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        for line in _PROC.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUP / "memory" if controllers else _CGROUP
            group = root / path.lstrip("/")
            for each in (group, *group.parents):
                available = min(available, _left_in(each, available, is_v1=bool(controllers)))
                if each == root:
                    break
    return available


def _left_in(group: Path, unlimited: int, *, is_v1: bool) -> int:
    """Return what a cgroup still allows; files in memory give way and do not count."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_file, used_file, files = (
        names if is_v1 else ("memory.max", "memory.current", "inactive_file")
    )
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max":
            return unlimited
        used = int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get(files, 0))
    except (OSError, ValueError):
        return unlimited
