"""The GGUF file of a merged model: written by llama.cpp's converter where it is installed.

Else it is written here (`gguf_writing`), for models built like Llama. Imports no torch.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.errors import RunError, UserError
from lora_train.merge.gguf_fields import architecture, gguf_tokenizer, rope_divisors
from lora_train.merge.plan import MergePlan

log = logging.getLogger(__name__)

GGUF_KINDS = ("bf16", "f16", "f32", "q8_0")
"""Types that `--gguf` takes; the converter knows them too."""

_CONVERTER = "convert_hf_to_gguf.py"
# Q8_0: 32 numbers in 34 bytes
_BYTES = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter."""

    file: Path
    command: tuple[str, ...]
    """The words that start it."""

    def run(self, *words: str) -> str | None:
        """Run it to its end.

        Args:
            *words: its command line.

        Returns:
            The last line of why it failed; None: it did not.
        """
        # it imports modules that lie beside it
        environment = {key: each for key, each in os.environ.items() if key != "PYTHONSAFEPATH"}
        result = subprocess.run(
            [*self.command, *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        if result.returncode == 0:
            return None
        return (result.stderr.strip() or f"it ended with {result.returncode}").splitlines()[-1]


def find_converter() -> Converter | None:
    """Look for llama.cpp's converter.

    Returns:
        That of $LLAMA_CPP_DIR, or on the PATH; None: there is none, or (which is logged) it does
        not start.

    Raises:
        UserError: the variable names a folder that has none.
    """
    folder = os.environ.get("LLAMA_CPP_DIR")
    if folder:
        file = Path(folder).expanduser() / _CONVERTER
        if not file.is_file():
            raise UserError(
                f"LLAMA_CPP_DIR={folder} holds no {_CONVERTER}",
                hint="name the folder of a llama.cpp checkout, or unset it",
            )
        own = [file.parent / name / "bin/python" for name in (".venv", "venv")]
        python = next((each for each in own if each.exists()), Path(sys.executable))
        converter = Converter(file, (str(python), str(file)))
    else:
        found = shutil.which(_CONVERTER)
        if found is None:
            return None
        converter = Converter(Path(found), (found,))
    obstacle = converter.run("--help")
    if obstacle is None:
        return converter
    log.warning("%s is not used: %s", converter.file, obstacle)
    return None


@dataclass(frozen=True)
class GgufJob:
    """A GGUF file that is to be written."""

    kind: str
    name: str
    """Of the model; the file's begins with it."""
    num_bytes: int
    """About what it takes."""
    converter: Converter | None
    """llama.cpp's; None: written here."""
    tokenizer: Any

    def write(self, folder: Path) -> Path:
        """Write the file.

        Args:
            folder: of the merged model; it goes there.

        Returns:
            The file.

        Raises:
            RunError: llama.cpp's converter failed, or what is read back differs.
        """
        file = folder / f"{self.name}-{self.kind}.gguf"
        if self.converter is not None:
            obstacle = self.converter.run(
                str(folder), "--outfile", str(file), "--outtype", self.kind,
                # else it takes the folder's name, which is not the final one yet
                "--model-name", self.name,
            )  # fmt: skip
            if obstacle is not None or not file.is_file():
                file.unlink(missing_ok=True)
                raise RunError(f"{self.converter.file}: {obstacle or 'it wrote no file'}")
            return file
        from lora_train.merge.gguf_writing import write_gguf  # imports torch

        try:
            write_gguf(folder, file, self.kind, self.name, self.tokenizer)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return file


def plan_gguf(kind: str, name: str, base: Path, plan: MergePlan, tokenizer: Any) -> GgufJob:
    """Find out how a GGUF file can be written, before anything is.

    Args:
        kind: one of `GGUF_KINDS`.
        name: of the model.
        base: the base model's folder.
        plan: the merged model.
        tokenizer: of the base, with the run's chat template.

    Returns:
        What is to be done.

    Raises:
        UserError: there is no converter, and it is of an architecture or with a tokenizer that is
            not written here.
    """
    elements = sum(math.prod(tensor.base.shape) for tensor in plan.tensors)
    num_bytes = round(elements * _BYTES[kind])
    converter = find_converter()
    if converter is None:
        rope_divisors(plan.config)
        architecture(plan.config)
        gguf_tokenizer(base, tokenizer, int(plan.config["vocab_size"]))
    return GgufJob(kind, name, num_bytes, converter, tokenizer)
