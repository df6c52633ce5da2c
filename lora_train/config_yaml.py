"""YAML as configuration files have it: one mapping, no key twice, every mistake with its line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from lora_train.errors import UserError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is refused (PyYAML keeps the last)."""

    # on the nodes, before `<<: *other` brings in keys that those beside it may replace
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = f"a key is one word, found a {'list' if key.id == 'sequence' else key.id}"
            elif key.value in seen:
                problem = f"key `{key.value}` is given twice"
            else:
                seen.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


def parse_yaml(text: str) -> Any:
    """Parse YAML text.

    Args:
        text: the text.

    Returns:
        What it holds; None for an empty text.

    Raises:
        ValueError: it is not YAML, repeats a key, or is nested too deeply; begins with the line
            and column where they are known.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.line + 1}:{mark.column + 1}: " if mark else " "
        raise ValueError(f"{place}{error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ValueError(
            f"{line}:{column}: control character #x{ord(text[error.position]):02x}"
        ) from error
    except RecursionError as error:
        raise ValueError(" nested too deeply") from error
    except ValueError as error:  # 2026-02-30
        raise ValueError(f" {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file.

    Returns:
        The mapping; empty for an empty file.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(
            f"cannot read configuration file {path}: {getattr(error, 'strerror', None) or error}",
            hint=did_you_mean(path.name, siblings),
        ) from error
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}:{error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `section:` lines, found a {type(tree).__name__}")
    return tree


def did_you_mean(name: str, known: list[str]) -> str | None:
    """A hint with the known name nearest to a wrong one, or None."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{close[0]}`?" if close else None
