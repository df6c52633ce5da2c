"""Reading JSON Lines, JSON and CSV files so that every row knows its line and column.

The `datasets` library is not used for these three: its type inference changes text (measured with
datasets 5.2: the strings "2020-01-01" come back as timestamps, CSV "007" as 7 and "NA" as null),
and its errors name no line. Parquet files, and what only a dataset's card tells how to read, go
through `datasets`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_train.data.messages import RowError
from lora_train.errors import UserError

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


@dataclass
class RowFile:
    """Rows of one file (or table), and where each stands."""

    name: str
    """What messages call it: the path, or the name of a hub dataset."""
    rows: list[Any] = field(default_factory=list)
    """Decoded rows."""
    numbers: list[int] = field(default_factory=list)
    """Number of each row: its line (JSON Lines, CSV), else its place counted from 1."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Lines that are no rows, as (number, message with its place)."""
    locate: Callable[[int, tuple[str | int, ...]], str] = lambda number, path: f"row {number}"
    """Place of a value, from the row's number and the path in the row: `LINE:COLUMN`."""
    from_table: bool = False
    """Whether the rows come from an Arrow table, which fills in nulls."""

    def problem(self, index: int, error: RowError) -> tuple[int, str]:
        """Describe what is wrong with a row, with its place."""
        number = self.numbers[index]
        return number, f"{self.name}:{self.locate(number, error.path)}: {error}"


def read_rows(file: Path) -> RowFile:
    """Read a .jsonl, .json or .csv file.

    Args:
        file: the file; its ending says what it is. A .json file may also hold one object per line,
            and a .jsonl file an array.

    Returns:
        The rows, and the lines that could not be decoded.

    Raises:
        UserError: the file cannot be read, or holds nothing.
    """
    try:
        if file.suffix.lower() == ".csv":
            result = _read_csv(file)
        else:
            with _open(file) as lines:
                start = next((line for line in lines if line.strip()), "").lstrip()
            if start.startswith("[") or (file.suffix.lower() == ".json" and not _is_json(start)):
                result = _read_document(file)
            else:
                result = _read_lines(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    if not result.rows and not result.problems:
        raise UserError(
            f"{file} holds no rows ({file.stat().st_size} bytes)",
            hint="check what wrote it; one JSON object per line is expected",
        )
    return result


def _open(file: Path) -> Any:
    # newline="\n": a line ends at a line feed only, and a lone \r is a blank inside of it;
    # surrogateescape: a stray byte is reported with its line, instead of ending the whole read
    return file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_lines(file: Path) -> RowFile:
    def locate(number: int, path: tuple[str | int, ...]) -> str:
        with _open(file) as lines:
            line = next(line for count, line in enumerate(lines, 1) if count == number)
        return f"{number}:{_offset_of(line, 0, path) + 1}"

    result = RowFile(str(file), locate=locate)
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.strip():
                    continue
                column, message = _json_problem(error, line)
                result.problems.append((number, f"{file}:{number}:{column}: {message}"))
                continue
            result.rows.append(row)
            result.numbers.append(number)
    return result


def _json_problem(error: ValueError, line: str) -> tuple[int, str]:
    stray = _STRAY_BYTE.search(line)
    if stray:
        byte = ord(stray.group()) - 0xDC00
        return stray.start() + 1, f"not valid UTF-8: byte 0x{byte:02x}"
    if not isinstance(error, json.JSONDecodeError):
        return 1, f"invalid JSON: {error}"
    seen = line[error.pos : error.pos + 20].strip()
    found = f"; found {seen}" if seen else "; found the end of the line"
    return error.pos + 1, f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}{found}"


def _read_document(file: Path) -> RowFile:
    """Read a JSON file that is one document: an array of rows, or an object that holds one."""
    with _open(file) as stream:
        text = stream.read()
    try:
        document = json.loads(text)
    except ValueError as error:
        stray = _STRAY_BYTE.search(text)
        offset = stray.start() if stray else getattr(error, "pos", 0)
        line_number, line_start = _line_of(text, offset)
        column, message = _json_problem(error, text)
        place = f"{file}:{line_number}:{column - line_start}"
        return RowFile(str(file), problems=[(line_number, f"{place}: {message}")])

    base: tuple[str | int, ...] = ()
    if isinstance(document, dict):
        holders = [
            key
            for key, value in document.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        # {"data": [rows]} and {"version": 1, "data": [rows]}; {"messages": [...]} is a row itself
        if len(holders) == 1 and holders[0] not in ("messages", "conversations"):
            base = (holders[0],)
            document = document[holders[0]]
        else:
            document = [document]
            base = ("",)

    def locate(number: int, path: tuple[str | int, ...]) -> str:
        inside = path if base == ("",) else (*base, number - 1, *path)
        offset = _offset_of(text, 0, inside)
        line_number, line_start = _line_of(text, offset)
        return f"{line_number}:{offset - line_start + 1}"

    return RowFile(str(file), document, list(range(1, len(document) + 1)), locate=locate)


def _line_of(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, text.rfind("\n", 0, offset) + 1


def _offset_of(text: str, start: int, path: tuple[str | int, ...]) -> int:
    """Find where the value at `path` begins in a valid JSON text; if absent, its nearest parent.

    Walks the text with json's own scanner, so it needs no second parser.
    """
    decoder = json.JSONDecoder()
    position = _skip(text, start)
    for part in path:
        found = None
        for key, value_at in _members(decoder, text, position):
            if key == part:
                found = value_at  # of duplicate keys json keeps the last
        if found is None:
            break
        position = found
    return position


def _members(
    decoder: json.JSONDecoder, text: str, position: int
) -> Iterator[tuple[str | int, int]]:
    """Yield the keys (or indexes) of the object (or array) at `position`, with their places."""
    if position >= len(text) or text[position] not in "{[":
        return
    is_object = text[position] == "{"
    position = _skip(text, position + 1)
    index = 0
    while position < len(text) and text[position] not in "}]":
        key: str | int = index
        if is_object:
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, _skip(text, position) + 1)  # the colon
        yield key, position
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position)
        if position < len(text) and text[position] == ",":
            position = _skip(text, position + 1)
        index += 1


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def _read_csv(file: Path) -> RowFile:
    # the default limit of 128 KiB per field is shorter than some documents
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

    def locate(number: int, path: tuple[str | int, ...]) -> str:
        return str(number)

    result = RowFile(str(file), locate=locate)
    # csv wants the line ends as they are, as they may stand inside of quotes
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return result
            except csv.Error as error:
                result.problems.append((number, f"{file}:{number}: invalid CSV: {error}"))
                return result
            if not header:
                header = [name.strip() for name in fields]
            elif len(fields) == len(header):
                result.rows.append(dict(zip(header, fields, strict=True)))
                result.numbers.append(number)
            elif fields:
                message = f"expected {len(header)} fields as in the header, found {len(fields)}"
                result.problems.append((number, f"{file}:{number}: {message}"))
