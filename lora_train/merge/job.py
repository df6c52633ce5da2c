"""A merge that is to be done, checked as far as the headers of the files tell.

Imports no torch: a base that is not the adapter's is refused before torch is loaded.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from lora_train.errors import UserError
from lora_train.merge.adapter_file import AdapterFile, read_adapter
from lora_train.merge.base_model import BaseModel, find_base
from lora_train.merge.base_name import BaseName, portable_name, write_base_name
from lora_train.merge.folder import TokenFacts
from lora_train.merge.model_card import write_adapter_card
from lora_train.merge.plan import MergePlan, plan_merge
from lora_train.merge.serving import Serving, check_serving
from lora_train.merge.tensor_files import read_folder
from lora_train.preflight.folders import existing_parent, free_bytes
from lora_train.recorded_run import RecordedRun

log = logging.getLogger(__name__)

# configuration, tokenizer
_SPARE_DISK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MergeJob:
    """What is to be merged."""

    run: RecordedRun
    adapter: AdapterFile
    base: BaseModel
    base_name: BaseName
    plan: MergePlan
    output: Path
    """Absolute."""
    proof_data: Path | None
    """Rows to compare on; None: the run's own validation split."""
    proof_rows: int
    """At most so many rows; 0: no proof."""
    gguf_kind: str | None
    """Type of the GGUF file that is also written, if any."""

    @property
    def vocabulary(self) -> int | None:
        """Rows of the base's embedding, if its config.json says."""
        config = self.base.config
        found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return None if found is None else int(found)

    def serving(self, tokens: TokenFacts, merged: Path) -> Serving:
        """Say how adapter and merged model are served.

        Args:
            tokens: of the tokenizer.
            merged: folder of the merged model.

        Returns:
            The findings, and the lines to paste.
        """
        return check_serving(
            self.adapter,
            name=self.run.name,
            base=self.base.folder,
            is_tied=self.plan.is_base_tied,
            vocabulary=self.vocabulary,
            tokens=tokens,
            merged=merged,
        )


def prepare_job(
    run: RecordedRun,
    output: Path,
    *,
    base: str | None,
    base_name: str | None,
    proof_data: Path | None,
    proof_rows: int,
    gguf_kind: str | None,
) -> MergeJob:
    """Check that a run's adapter can be merged.

    Args:
        run: the run.
        output: the folder to be made.
        base: another copy of the base; None: what the run names.
        base_name: hub name of the base; None: told by the run.
        proof_data: rows to compare on; None: the run's own validation split.
        proof_rows: at most so many rows; 0: no proof.
        gguf_kind: type of a GGUF file that is also written, if any.

    Returns:
        What is to be done.

    Raises:
        UserError: the output is not empty, the run has no adapter, or the base is not here, is
            quantized, or another model.
    """
    output = Path(os.path.abspath(output.expanduser()))
    _check_output(output)
    folder, step = run.adapter()
    if step is not None:
        log.info("the run is not finished: adapter of step %d", step)
    adapter = read_adapter(folder)
    found = find_base(run, base)
    log.info("base %s, known by %s", found.folder, found.identity)
    plan = plan_merge(adapter, read_folder(found.folder), found.config, str(found.folder))
    notes = list(plan.notes)
    if run.config.model.quantization is not None:
        notes.append(
            f"the run trained beside the base in 4 bit ({run.config.model.quantization}), and the "
            "adapter makes up for some of its rounding; it is added to the unquantized base"
        )
    if run.config.model.path.endswith(".gguf"):
        notes.append(
            f"the base is the bf16 copy of {run.config.model.path} that the run trained on"
        )
    for note in notes:
        log.info("note: %s", note)
    model = run.config.model
    name = portable_name(model.path, model.revision, found.commit)
    if base_name is not None:
        name = BaseName(base_name)
    if name.warning is not None:
        log.warning("%s", name.warning)
    return MergeJob(run, adapter, found, name, plan, output, proof_data, proof_rows, gguf_kind)


def name_base(run: RecordedRun, name: str) -> None:
    """Let the adapter of a finished run name its base model.

    Args:
        run: the run.
        name: hub name, org/name.

    Raises:
        UserError: the run has no finished adapter, or it cannot be written.
    """
    adapter, step = run.adapter()
    if step is not None:
        raise UserError(
            f"--base-name: {run.path} has no finished adapter yet, and checkpoints stay as they "
            "are",
            hint="give the run's command again to go on with it",
        )
    try:
        write_base_name(adapter, BaseName(name))
        write_adapter_card(adapter, run.config, run.path)
    except OSError as error:
        raise UserError(
            f"--base-name: cannot write {error.filename or adapter}: {error.strerror}",
            hint="copy the adapter's folder to where you may write, and name its base there",
        ) from error
    log.info("%s: the base is %s", adapter, name)


def unproven_folder(output: Path) -> Path:
    """Return where a merged model goes that is not proven."""
    return output.with_name(f"{output.name}.unproven")


def _check_output(output: Path) -> None:
    """Refuse an output folder that holds something, or cannot be made.

    Args:
        output: the folder to be made.

    Raises:
        UserError: it is a file or not empty, or an unproven model lies beside it, or the folder
            that it goes to cannot be written.
    """
    for folder in (output, unproven_folder(output)):
        if folder.is_dir() and not any(folder.iterdir()):
            continue
        if folder.exists() or folder.is_symlink():
            raise UserError(
                f"--output {output}: {folder} is there already",
                hint="name another folder, or remove it",
            )
    parent = existing_parent(output.parent)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(
            f"--output {output}: {parent} cannot be written", hint="name a folder of your own"
        )


def check_disk(output: Path, needed: int) -> None:
    """Refuse a disk that the merged model will not fit on.

    Args:
        output: the folder to be made.
        needed: bytes that it will take.

    Raises:
        UserError: less is free; a quota does not show.
    """
    parent = existing_parent(output)
    free = free_bytes(parent)
    if free is not None and free < needed + _SPARE_DISK_BYTES:
        raise UserError(
            f"{parent}: {free / 1e9:,.1f} GB free, the merged model takes {needed / 1e9:,.1f}",
            hint="--output on a larger file system",
        )
