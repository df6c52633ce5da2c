"""An answer against its references: verbatim, by SQuAD's rules, and field by field as JSON.

SQuAD's rules are those of its official script (evaluate-v2.0.py): lower case, no punctuation, no
articles, single blanks; of several references the best counts.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Scores:
    """One answer's scores, the best over its references."""

    exact_match: float
    """1 if equal to a reference, blanks at the ends aside; JSON objects and lists by value."""
    squad_exact: float
    """1 if equal after SQuAD's normalization."""
    f1: float
    """SQuAD's F1 of the words, 0 to 1."""
    json_valid: float | None
    """1 if the answer is a JSON object or list; None unless every reference is one."""
    field_f1: float | None
    """F1 of the fields, each with its path and value, 0 to 1; None unless all are JSON."""


def score(answer: str, references: Sequence[str]) -> Scores:
    """Compare an answer with its references.

    Args:
        answer: what the model wrote.
        references: what it might have written; at least one.

    Returns:
        For each measure the best over the references.
    """
    expected = [parse_structure(reference) for reference in references]
    are_json = all(each is not None for each in expected)
    found = parse_structure(answer)
    return Scores(
        exact_match=max(float(is_exact_match(answer, each)) for each in references),
        squad_exact=max(float(squad_exact(answer, each)) for each in references),
        f1=max(squad_f1(answer, each) for each in references),
        json_valid=float(found is not None) if are_json else None,
        field_f1=max(field_f1(found, each) for each in expected) if are_json else None,
    )


def is_exact_match(answer: str, reference: str) -> bool:
    """Compare an answer with the reference: by value where the reference is a JSON object or list.

    1 and 1.0 are one value, 1 and true are two.

    Args:
        answer: what the model wrote.
        reference: what it should have written.

    Returns:
        Whether they are equal, blanks at the ends aside.
    """
    expected = parse_structure(reference)
    if expected is None:
        return answer.strip() == reference.strip()
    found = parse_structure(answer)
    # to Python's own == true is 1
    return found is not None and Counter(_fields(found)) == Counter(_fields(expected))


def parse_structure(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the JSON object or list that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def squad_normalize(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no punctuation, articles or double blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def squad_exact(answer: str, reference: str) -> bool:
    """Return whether two texts are the same to SQuAD."""
    return squad_normalize(answer) == squad_normalize(reference)


def squad_f1(answer: str, reference: str) -> float:
    """Return SQuAD's F1 of the words of two texts, 0 to 1; 1 where nothing is left of both."""
    found, expected = squad_normalize(answer).split(), squad_normalize(reference).split()
    if not found or not expected:
        return float(found == expected)
    return _f1(Counter(found), Counter(expected))


def field_f1(found: Any, expected: Any) -> float:
    """Compare two JSON values field by field.

    Args:
        found: the answer's value; None: it is no JSON.
        expected: the reference's value.

    Returns:
        F1 of their fields, 0 to 1. A field is a value that is no object or list, at its path; the
        places in a list count. Empty objects and lists are fields themselves.
    """
    if found is None:
        return 0.0
    return _f1(Counter(_fields(found)), Counter(_fields(expected)))


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _fields(inner, f"{path}[{place}]")
    else:
        is_whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if is_whole else value)


def _f1(found: Counter[Any], expected: Counter[Any]) -> float:
    common = (found & expected).total()
    if common == 0:
        return 0.0
    precision, recall = common / found.total(), common / expected.total()
    return 2 * precision * recall / (precision + recall)
