"""What `lora-train eval` has measured of a run (eval_NAME.json), for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_train.recorded_run import RecordedRun
from lora_train.report import formats
from lora_train.report.records import number

# (key of `evaluation.result.figures`, what readers call it); F1 of JSON's fields where it applies
_FIGURES = (("loss", "loss"), ("exact_match", "exact match"), ("field_f1", "F1"), ("f1", "F1"))
FIGURE_NAMES = ("loss", "exact match", "F1")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run."""

    name: str
    content: dict[str, Any]
    """Of eval_NAME.json, see `evaluation.session.evaluate`."""

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Figures by variant, the base first."""
        found = self.content.get("results")
        kept = found.items() if isinstance(found, dict) else []
        return {key: value for key, value in reversed(list(kept)) if isinstance(value, dict)}

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        num_rows = self.content.get("num_rows")
        notes = [f"{self.content.get('subject')} on {self.content.get('rows')}."]
        if any("field_f1" in figures for figures in self.results.values()):
            notes.append("F1 is that of the JSON's fields.")
        if count := self.content.get("num_in_training"):
            notes.append(f"{count} of {num_rows} rows are in the training data: figures flatter.")
        if count := self.content.get("num_too_long"):
            notes.append(f"{count} of {num_rows} rows were too long for the loss.")
        return notes


def read_evaluations(run: RecordedRun) -> list[Evaluation]:
    """Read the evaluations of a run.

    Args:
        run: the run.

    Returns:
        Those that are whole, by name.
    """
    found = []
    for file in sorted(run.path.glob("eval_*.json")):
        content = run.read_json(file.name)
        if isinstance(content, dict):
            evaluation = Evaluation(file.stem.removeprefix("eval_"), content)
            found += [evaluation] if evaluation.results else []
    return found


def evaluation_table(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield the lines of an evaluation: one a variant, and the difference of two.

    Args:
        evaluation: one.

    Yields:
        name, rows, and figures: text and 95 % interval for each of `FIGURE_NAMES`.
    """
    for variant, figures in evaluation.results.items():
        rows = formats.fixed(number(figures, "num_measured"), 0)
        answered = formats.fixed(number(figures, "num_answered"), 0)
        if answered not in ("0", rows):
            rows += f", {answered} answered"
        yield {"name": variant, "rows": rows, "figures": _cells(figures, is_signed=False)}
    difference = evaluation.content.get("difference")
    if isinstance(difference, dict):
        yield {"name": "difference", "rows": "", "figures": _cells(difference, is_signed=True)}


def evaluation_rows(evaluations: list[list[Evaluation]]) -> list[dict[str, Any]]:
    """Return the figures of what was trained, for runs side by side.

    Args:
        evaluations: of each run.

    Returns:
        label and texts (one for each run) of each figure of each evaluation.
    """
    labels: dict[str, list[str]] = {}
    for place, of_run in enumerate(evaluations):
        for evaluation in of_run:
            *_, figures = evaluation.results.values()  # the adapter stands behind the base
            for name, cell in zip(FIGURE_NAMES, _cells(figures, is_signed=False), strict=True):
                texts = labels.setdefault(
                    f"eval {evaluation.name}: {name}", [formats.UNKNOWN] * len(evaluations)
                )
                texts[place] = cell["text"]
    return [
        {"label": label, "texts": texts}
        for label, texts in labels.items()
        if set(texts) != {formats.UNKNOWN}
    ]


def _cells(figures: dict[str, Any], *, is_signed: bool) -> list[dict[str, str]]:
    intervals = figures.get("intervals")
    cells = {name: {"text": formats.UNKNOWN, "interval": ""} for name in FIGURE_NAMES}
    for key, name in reversed(_FIGURES):
        value = number(figures, key)
        if not math.isfinite(value):
            continue
        ends = intervals.get(key) if isinstance(intervals, dict) else None
        texts = [_text(key, end, is_signed=is_signed) for end in ends] if ends else []
        cells[name] = {
            "text": _text(key, value, is_signed=is_signed),
            "interval": " to ".join(texts),
        }
    return list(cells.values())


def _text(key: str, value: float, *, is_signed: bool) -> str:
    text = formats.loss(value) if key == "loss" else formats.percent(value)
    return f"+{text}" if is_signed and value > 0 else text
