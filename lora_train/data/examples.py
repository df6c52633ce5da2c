"""From splits to checked examples, with every bad line named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_train.config import DataConfig
from lora_train.data.formats import Example, detect_format, normalize
from lora_train.data.messages import RowError
from lora_train.data.row_files import RowFile
from lora_train.data.sources import Sources
from lora_train.data.splits import Split
from lora_train.errors import UserError

_MOST_SHOWN = 20


@dataclass
class Examples:
    """Checked examples of one set, and where each came from."""

    name: str
    """The file, folder or hub dataset, for messages."""
    format_name: str
    """What was found: one of the values of `data.format`, without `auto`."""
    is_held_out: bool = False
    """Whether these are training rows that were held out, for want of a validation split."""
    items: list[Example] = field(default_factory=list)
    """The examples."""
    origins: list[tuple[RowFile, int]] = field(default_factory=list)
    """For each example its file and its index there."""

    def subset(self, indexes: np.ndarray) -> Examples:
        """Return some of the examples, in the given order."""
        return Examples(
            self.name,
            self.format_name,
            self.is_held_out,
            [self.items[index] for index in indexes],
            [self.origins[index] for index in indexes],
        )

    def refuse(self, errors: Sequence[tuple[int, RowError]]) -> None:
        """Refuse the examples that could not be rendered.

        Args:
            errors: index of an example, and what is wrong with it.

        Raises:
            UserError: there is at least one.
        """
        problems = []
        for index, error in errors[:_MOST_SHOWN]:
            file, row = self.origins[index]
            problems.append(file.problem(row, error)[1])
        _refuse(self.name, problems, len(errors), len(self.items))


def read_examples(split: Split, format_name: str) -> Examples:
    """Read and check all rows of a split.

    Args:
        split: where the rows are.
        format_name: `data.format`; with auto, the keys of the first row decide.

    Returns:
        The examples, in the order of the files.

    Raises:
        UserError: names up to 20 bad lines at once, each with file, line, column and what was
            expected.
    """
    examples = Examples(split.name, format_name)
    problems: list[str] = []
    num_problems = num_rows = 0
    for file in split.read():
        found = list(file.problems)
        if examples.format_name == "auto":
            first = next((row for row in file.rows if isinstance(row, dict)), None)
            if first is not None:
                keys = [key for key, value in first.items() if value is not None]
                examples.format_name = detect_format(keys, f"{file.name}:{file.numbers[0]}")
        for index, row in enumerate(file.rows):
            try:
                example = normalize(row, examples.format_name, drop_nulls=file.from_table)
            except RowError as error:
                # places are costly to find, and only the first are shown
                shown = len(found) < 2 * _MOST_SHOWN
                found.append(file.problem(index, error) if shown else (file.numbers[index], ""))
                continue
            examples.items.append(example)
            examples.origins.append((file, index))
        found.sort(key=lambda problem: problem[0])
        problems += [message for _, message in found]
        num_problems += len(found)
        num_rows += len(file.rows) + len(file.problems)
    _refuse(split.name, problems, num_problems, num_rows)
    return examples


def _refuse(name: str, problems: list[str], num_problems: int, num_rows: int) -> None:
    if not num_problems:
        return
    lines = problems[:_MOST_SHOWN]
    if num_problems > len(lines):
        lines.append(f"and {num_problems - len(lines)} more")
    hint = "mend or delete these lines; nothing is skipped silently"
    if any("found a timestamp" in line for line in lines):
        hint = (
            "the datasets library reads ISO dates in JSON as timestamps; download the dataset and"
            " name its folder, data.path=<snapshot folder>: there text stays as it is"
        )
    raise UserError(
        f"{num_problems} of {num_rows} rows of {name} cannot be used:\n  " + "\n  ".join(lines),
        hint=hint,
    )


def read_sets(sources: Sources, data: DataConfig, seed: int) -> tuple[Examples, Examples | None]:
    """Read the training and the validation examples.

    Args:
        sources: where they are.
        data: the data section.
        seed: seed of which training examples are held out, if there is no validation split.

    Returns:
        Training and validation examples; None without validation.

    Raises:
        UserError: a line is bad, or there is nothing to train on.
    """
    train = read_examples(sources.train, data.format)
    if sources.validation is not None:
        return train, read_examples(sources.validation, data.format)
    num_held_out = _num_held_out(len(train.items), sources.held_out_fraction)
    if num_held_out == 0:
        return train, None
    # rows are held out, not rendered sequences: turns of one conversation stay on one side
    shuffled = np.random.default_rng(seed).permutation(len(train.items))
    validation = train.subset(np.sort(shuffled[:num_held_out]))
    validation.name, validation.is_held_out = held_out_name(train.name), True
    return train.subset(np.sort(shuffled[num_held_out:])), validation


def read_validation(sources: Sources, data: DataConfig, seed: int) -> Examples | None:
    """Read the validation examples alone; the training rows only where they are held out of them.

    Args:
        sources: where they are.
        data: the data section.
        seed: as for `read_sets`.

    Returns:
        The same validation examples as `read_sets`; None without validation.

    Raises:
        UserError: a line is bad.
    """
    if sources.validation is not None:
        return read_examples(sources.validation, data.format)
    return read_sets(sources, data, seed)[1]


def held_out_name(name: str) -> str:
    """Return what messages call the rows held out from a set."""
    return f"{name} (held out)"


def _num_held_out(num_rows: int, fraction: float) -> int:
    if fraction == 0.0 or num_rows < 2:
        return 0
    return min(num_rows - 1, max(1, math.floor(num_rows * fraction + 0.5)))
