"""Prepared data on disk: whole or absent, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lora_train.data.packing import Packs
from lora_train.data.tokenized_set import DataReport, PreparedData, SetReport, TokenizedSet
from lora_train.paths import atomic_folder

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def save_prepared(data: PreparedData, folder: Path) -> None:
    """Write prepared data as memory-mappable files; the folder appears whole or not at all.

    Args:
        data: what to write.
        folder: the folder to make; if another process makes it first, its files stay.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    sets = {"train": (data.train, data.train_packs)}
    if data.validation is not None and data.validation_packs is not None:
        sets["validation"] = (data.validation, data.validation_packs)
    with atomic_folder(folder) as work:
        hashes = {}
        for name, (examples, packs) in sets.items():
            arrays = {
                "tokens": examples.tokens,
                "supervised": examples.supervised,
                "offsets": examples.offsets,
                "pack_members": packs.members,
                "pack_offsets": packs.offsets,
            }
            for kind, array in arrays.items():
                file = work / f"{name}.{kind}.npy"
                np.save(file, array)
                hashes[file.name] = _hash_of(file)
        manifest = {
            "content_hash": data.content_hash,
            "files": hashes,
            "report": asdict(data.report),
        }
        (work / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load_prepared(folder: Path) -> PreparedData | None:
    """Read prepared data, memory-mapped.

    Args:
        folder: what `save_prepared` made. If its files are damaged it is moved away.

    Returns:
        The data; None if there is none, or none whole.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        damaged = [
            name for name, digest in manifest["files"].items() if _hash_of(folder / name) != digest
        ]
        if damaged:
            raise ValueError(f"{', '.join(damaged)} changed since it was written")
        train, train_packs = _load_set(folder, "train")
        validation, validation_packs = None, None
        if "validation.tokens.npy" in manifest["files"]:
            validation, validation_packs = _load_set(folder, "validation")
        return PreparedData(
            train,
            train_packs,
            validation,
            validation_packs,
            _report_of(manifest["report"]),
            manifest["content_hash"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the prepared data in %s is damaged and made anew: %s", folder, error)
        # under the name that atomic_folder clears away later, should the removal not succeed
        aside = folder.with_name(f".{folder.name}.tmp-damaged-{os.uname().nodename}-{os.getpid()}")
        try:
            folder.rename(aside)
        except OSError:
            return None
        shutil.rmtree(aside, ignore_errors=True)
        return None


def _load_set(folder: Path, name: str) -> tuple[TokenizedSet, Packs]:
    def array(kind: str) -> np.ndarray:
        # a plain view: slices of np.memmap carry its bookkeeping and are some times slower
        return np.load(folder / f"{name}.{kind}.npy", mmap_mode="r").view(np.ndarray)

    return (
        TokenizedSet(array("tokens"), array("supervised"), array("offsets")),
        Packs(array("pack_members"), array("pack_offsets")),
    )


def _report_of(values: dict[str, Any]) -> DataReport:
    validation = values["validation"]
    return DataReport(
        format=values["format"],
        seq_length=values["seq_length"],
        train=SetReport(**values["train"]),
        validation=None if validation is None else SetReport(**validation),
        notes=tuple(values["notes"]),
    )


def _hash_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
