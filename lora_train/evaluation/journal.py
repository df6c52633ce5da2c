"""What an evaluation has measured so far, on disk: one that was stopped goes on with it.

FILE.part holds a first line that says what is measured, then a line for each sequence's loss and
for each answer. Lines are added a batch at a time, so a kill costs one batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from lora_train.errors import RunError, UserError

logger = logging.getLogger(__name__)


class Journal:
    """The unfinished part of an evaluation.

    Args:
        results: the file that the finished rows will be in; the journal lies beside it.
        fingerprint: all that the measures depend on, by name. A journal of another one, or one that
            cannot be read, is set aside as FILE.part.old.

    Raises:
        UserError: another process has it open, or it cannot be written.
    """

    def __init__(self, results: Path, fingerprint: dict[str, Any]) -> None:
        self.path = results.with_name(f"{results.name}.part")
        self.losses: dict[tuple[str, int], tuple[float, int]] = {}
        """(variant, sequence) -> sum in nats, and the tokens it is over."""
        self.answers: dict[tuple[str, int], tuple[str, bool]] = {}
        """(variant, row) -> the answer, and whether it came to its end."""
        self._fingerprint = fingerprint
        self._file: TextIO | None = None
        self._lock = FileLock(results.with_name(f".{results.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
            self._read()
        except Timeout as error:
            raise UserError(
                f"another lora-train writes {results} at this moment",
                hint="one process evaluates: srun --ntasks=1; or --output ANOTHER.jsonl",
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write beside {results}: {error.strerror}",
                hint="--output FILE.jsonl in a folder of yours",
            ) from error

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line off
        try:
            header, *lines = map(json.loads, whole.splitlines())
            before = header["fingerprint"]
            if before == self._fingerprint:
                self._take(lines)
                if len(whole) < len(content):
                    with self.path.open("r+b") as file:
                        file.truncate(len(whole))
                return
            keys = sorted(before.keys() | self._fingerprint.keys())
            changed = [key for key in keys if before.get(key) != self._fingerprint.get(key)]
            why = f"was of another {', '.join(changed)}"
        except (ValueError, LookupError, TypeError, AttributeError):
            self.losses, self.answers = {}, {}
            why = "is damaged"
        aside = self.path.with_name(f"{self.path.name}.old")
        self.path.replace(aside)
        logger.warning(
            "the unfinished evaluation in %s %s: it is now %s", self.path, why, aside.name
        )

    def _take(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            if "sequence" in line:
                self.losses[line["of"], line["sequence"]] = (line["nats"], line["tokens"])
            else:
                self.answers[line["of"], line["row"]] = (line["answer"], line["is_complete"])

    def add_losses(self, of: str, losses: Iterable[tuple[int, float, int]]) -> None:
        """Keep losses.

        Args:
            of: the variant of the model.
            losses: sequence, sum in nats, and the tokens it is over.

        Raises:
            RunError: the disk is full.
        """
        self._add(
            {"of": of, "sequence": sequence, "nats": nats, "tokens": tokens}
            for sequence, nats, tokens in losses
        )

    def add_answers(self, of: str, answers: Iterable[tuple[int, str, bool]]) -> None:
        """Keep answers.

        Args:
            of: the variant of the model.
            answers: row, answer, and whether it came to its end.

        Raises:
            RunError: the disk is full.
        """
        self._add(
            {"of": of, "row": row, "answer": answer, "is_complete": is_complete}
            for row, answer, is_complete in answers
        )

    def _add(self, measured: Iterable[dict[str, Any]]) -> None:
        lines = list(measured)
        self._take(lines)
        try:
            if self._file is None:
                is_new = not self.path.exists()
                self._file = self.path.open("a", encoding="utf-8")
                if is_new:
                    self._file.write(json.dumps({"fingerprint": self._fingerprint}) + "\n")
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}",
                hint="make room, then give the same command again: what was measured is kept",
            ) from error

    def finish(self) -> None:
        """Remove the journal: all of it stands in the results now."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            # on a full disk what is still in the buffer fails again, and was said
            with contextlib.suppress(OSError):
                self._file.close()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
