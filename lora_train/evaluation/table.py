"""An evaluation as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "json_valid": "valid JSON",
    "field_f1": "F1 of the JSON fields",
    "squad_exact": "exact match (SQuAD)",
    "f1": "F1 (SQuAD)",
}
# of no use where the references are JSON: without punctuation nothing is left of its form
_OF_TEXT = ("squad_exact", "f1")
_LONGEST_SHOWN = 240
_CLEAR_P_VALUE = 0.05


def print_result(console: Console, summary: dict[str, Any]) -> None:
    """Print what `eval_NAME.json` holds.

    Args:
        console: where to.
        summary: its content.
    """
    results: dict[str, dict[str, Any]] = summary["results"]
    head = Text(f"{summary['subject']}\non {summary['rows']}", style="bold")
    console.print(head, soft_wrap=True)
    console.print()
    first = next(iter(results.values()))
    names = [name for name in _LABELS if name in first]
    if "json_valid" in names:
        names = [name for name in names if name not in _OF_TEXT]
    console.print(_figures(results, summary["difference"], names))
    notes = _notes(summary, names)
    if notes:
        console.print()
        for note in notes:
            console.print(Text(note))
    if summary["worst"]:
        console.print()
        console.print(Text("answers furthest off", style="bold"))
        for record in summary["worst"]:
            console.print(_sample(record, list(results)))
            console.print()
    else:
        console.print()
    console.print(Text(f"each row: {summary['rows_file']}"), soft_wrap=True)


def _figures(
    results: dict[str, dict[str, Any]], difference: dict[str, Any] | None, names: list[str]
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    # before and after, as in the summary of a run
    variants = list(reversed(results))
    for variant in variants:
        table.add_column(variant, justify="right")
    if difference is not None:
        table.add_column("difference", justify="right")
    table.add_column("95 % interval", justify="right")
    for name in names:
        cells = [_value(name, results[variant][name]) for variant in variants]
        intervals = results[variants[0]]["intervals"]
        if difference is not None:
            cells.append(_value(name, difference.get(name), signed=True))
            intervals = difference["intervals"]
        ends = intervals.get(name)
        is_signed = difference is not None
        cells.append(
            "" if ends is None else " to ".join(_value(name, end, signed=is_signed) for end in ends)
        )
        table.add_row(_LABELS[name], *cells)
    return table


def _value(name: str, value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = "+" if signed else ""
    if name in ("loss", "perplexity"):
        return f"{value:{sign}.4f}"
    return f"{100 * value:{sign}.1f}" + ("" if signed else "%")


def _notes(summary: dict[str, Any], names: list[str]) -> list[str]:
    results: dict[str, dict[str, Any]] = summary["results"]
    first = next(iter(results.values()))
    num_rows = summary["num_rows"]
    notes = []
    difference = summary["difference"]
    if difference is not None:
        notes += _verdicts(difference, names)
    count = summary["num_in_training"]
    if count:
        others = summary["without_training_rows"]
        without = ""
        if others is not None:
            shown = "exact_match" if "exact_match" in names else "loss"
            values = ", ".join(
                f"{variant} {_value(shown, others[variant].get(shown))}" for variant in others
            )
            without = f"; without them: {_LABELS[shown]} {values}"
        notes.append(
            f"warning: {count} of {num_rows} rows are in the training data: these figures flatter "
            f"what was trained on it{without}"
        )
    elif count is None:
        notes.append("whether rows are in the training data is not known")
    if summary["num_too_long"]:
        longer = "; --seq-length N takes longer ones"
        notes.append(
            f"{summary['num_too_long']} of {num_rows} rows are longer than {summary['limit']} and "
            "left out of the loss, and their prompts of the answers where these are too"
            f"{longer if summary['limit'].startswith('data.') else ''}"
        )
    if summary["num_input_cut"]:
        notes.append(f"the input of {summary['num_input_cut']} rows was cut, as in training")
    for variant, figures in results.items():
        if figures["num_cut"]:
            notes.append(
                f"{figures['num_cut']} of {figures['num_answered']} answers ({variant}) were cut "
                f"at {summary['max_new_tokens']} tokens; --max-new-tokens N allows longer ones"
            )
    if 0 < first["num_answered"] < num_rows:
        notes.append(f"answered: {first['num_answered']} of {num_rows} rows")
    return notes


def _verdicts(difference: dict[str, Any], names: list[str]) -> list[str]:
    notes = []
    test = difference.get("mcnemar")
    if test is not None:
        is_clear = test["p_value"] < _CLEAR_P_VALUE
        verdict = "a difference" if is_clear else "no clear difference: chance alone could do it"
        notes.append(
            f"exact match: the adapter alone is right on {test['gained']} rows, the base alone on "
            f"{test['lost']}; p = {test['p_value']:.2g} (McNemar): {verdict}"
        )
    unclear = [
        _LABELS[name]
        for name in names
        if name != "exact_match"
        and (ends := difference["intervals"].get(name)) is not None
        and ends[0] <= 0 <= ends[1]
    ]
    if unclear:
        notes.append(f"no clear difference on so few rows: {', '.join(unclear)}")
    return notes


def _sample(record: dict[str, Any], variants: list[str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("row", Text(record["place"]))
    prompt = _one_line(record["prompt"])
    # a question mostly stands at the end
    is_long = len(prompt) > _LONGEST_SHOWN
    table.add_row("prompt", Text(f"... {prompt[-_LONGEST_SHOWN:]}" if is_long else prompt))
    table.add_row("expected", _begin(" | ".join(record["references"])))
    for variant in reversed(variants):
        table.add_row(variant, _begin(record[variant]["answer"] or ""))
    return table


def _begin(text: str) -> Text:
    text = _one_line(text)
    return Text(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ...")


def _one_line(text: str) -> str:
    return " ".join(text.split())
