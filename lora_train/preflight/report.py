"""Findings for people, and for programs."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from lora_train.preflight.findings import Finding, Level

_STYLES: dict[Level, str] = {
    "error": "bold red",
    "warning": "bold yellow",
    "skipped": "dim",
    "ok": "green",
}
_INDENT = 2


def print_findings(findings: Sequence[Finding], file: TextIO, *, is_brief: bool = False) -> None:
    """Print findings, in the order given.

    Args:
        findings: what to print.
        file: stdout or stderr.
        is_brief: leave out why it matters.
    """
    # no markup, no highlights: paths hold brackets and numbers
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    for finding in findings:
        first = f"{finding.level}: {finding.check}: "
        lines = _wrapped(first + finding.seen, console.width, _INDENT)
        text = Text("\n".join(lines))
        text.stylize(_STYLES[finding.level], 0, len(finding.level))
        # a path or a command is never cut: what is copied must work
        console.print(text, soft_wrap=True)
        if finding.why and not is_brief:
            for line in _wrapped(finding.why, console.width - _INDENT, 0):
                console.print(" " * _INDENT + line, soft_wrap=True)
        if finding.mend:
            hint = Text(f"{' ' * _INDENT}hint: {finding.mend}")
            hint.stylize("bold", _INDENT, _INDENT + len("hint:"))
            console.print(hint, soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """Return one line that counts the findings by level."""
    counts = {level: sum(each.level == level for each in findings) for level in _STYLES}
    words = [
        f"{count} {level}{'s' if level in ('error', 'warning') and count > 1 else ''}"
        for level, count in counts.items()
        if count
    ]
    return f"preflight: {', '.join(words)}"


def to_json(findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON list of objects."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(40, width),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
