"""The answers that are right: one of a row, or several as in SQuAD's and NeMo's test rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lora_train.data.examples import Examples
from lora_train.data.formats import answer_text, detect_format
from lora_train.data.messages import RowError, expect_text, parse_json
from lora_train.data.nemo_squad import nemo_row
from lora_train.data.row_files import RowFile
from lora_train.data.splits import Split
from lora_train.errors import UserError


class WithSquadRows(Split):
    """A split in which rows in SQuAD's own columns become NeMo's test rows."""

    def read(self) -> Iterator[RowFile]:
        """Read the rows, file by file."""
        for file in super().read():
            first = next((row for row in file.rows if isinstance(row, dict)), {})
            yield _from_squad(file) if _is_squad(first) else file


def _is_squad(row: dict[str, Any]) -> bool:
    """Whether a row has SQuAD's columns, and is of no form that training takes."""
    if not {"context", "question"} <= row.keys():
        return False
    try:
        detect_format([key for key, value in row.items() if value is not None], "")
    except UserError:
        return True
    return False


def _from_squad(file: RowFile) -> RowFile:
    result = dataclasses.replace(file, rows=[], numbers=[], problems=list(file.problems))
    for index, row in enumerate(file.rows):
        try:
            result.rows.append(_nemo_row(row))
            result.numbers.append(file.numbers[index])
        except RowError as error:
            result.problems.append(file.problem(index, error))
    return result


def _nemo_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError('expected an object like {"context": ..., "question": ...}', found=row)
    for key in ("context", "question"):
        expect_text(row.get(key), (key,), filled=key)
    answers = parse_json(row.get("answers"), ("answers",))
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list):
        raise RowError('expected answers like {"text": [...]}', path=("answers",), found=answers)
    return nemo_row({**row, "answers": {"text": _filled(texts, ("answers", "text"))}}, is_test=True)


def _filled(texts: list[Any], path: tuple[str | int, ...]) -> list[str]:
    if not texts:
        raise RowError("no answer; a question without one cannot be scored", path=path)
    return [expect_text(text, (*path, place), filled="answer") for place, text in enumerate(texts)]


def references_of(examples: Examples) -> list[tuple[str, ...]]:
    """Return for each row the answers that are right: `original_answers`, else its one answer.

    Args:
        examples: rows with a prompt and an answer.

    Returns:
        At least one answer for each row, none of them blank.

    Raises:
        UserError: a row has none; names up to 20 at once, with their lines.
    """
    references: list[tuple[str, ...]] = []
    errors: list[tuple[int, RowError]] = []
    for index, (example, (file, place)) in enumerate(
        zip(examples.items, examples.origins, strict=True)
    ):
        try:
            several = parse_json(file.rows[place].get("original_answers"), ("original_answers",))
            if several is None:
                answer = answer_text(example)
                if not answer.strip():
                    raise RowError(
                        "the last answer calls a tool and has no text to compare with; "
                        "--loss-only leaves answers out"
                    )
                references.append((answer,))
            elif isinstance(several, list):
                references.append(tuple(_filled(several, ("original_answers",))))
            else:
                raise RowError("expected a list of answers", path=("original_answers",))
        except RowError as error:
            errors.append((index, error))
    examples.refuse(errors)
    return references
