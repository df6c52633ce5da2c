"""What `lora-train generate` loads, and what it is asked."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_train.errors import UserError


@dataclass(frozen=True)
class Source:
    """What is loaded: base model, adapter, and how the run asked it."""

    model: Any
    """Its ModelConfig."""
    precision: str
    """trainer.precision of the run; auto without a run."""
    adapter: Path | None
    """Folder in PEFT's format; None for the base model alone."""
    system: str | None
    """System message of the run's examples, if they had one."""


def find_source(options: argparse.Namespace) -> Source:
    """Return what to load for a command line.

    Args:
        options: the parsed command line; its `which` is filled in where it is None.

    Returns:
        What to load; no adapter where the base alone is to answer.

    Raises:
        UserError: the run directory, its configuration or an adapter is missing.
    """
    from lora_train.config import ModelConfig

    if options.run is None:
        source = Source(ModelConfig(path=options.model), "auto", options.adapter, options.system)
    else:
        source = _run_source(options.run)
        source = replace(source, adapter=options.adapter or source.adapter)
    if options.system is not None:
        source = replace(source, system=options.system or None)
    if source.adapter is not None and not (source.adapter / "adapter_config.json").is_file():
        raise UserError(f"{source.adapter} holds no adapter (no adapter_config.json)")
    if options.which is None:
        options.which = "base" if source.adapter is None else "adapter"
    if source.adapter is None and options.which != "base":
        raise UserError(
            f"--which {options.which}, but there is no adapter", hint="add --adapter DIR"
        )
    # the base alone needs no adapter on top
    return source if options.which != "base" else replace(source, adapter=None)


def _run_source(run_folder: Path) -> Source:
    from lora_train.recorded_run import read_run

    run = read_run(run_folder)
    adapter, step = run.adapter()
    if step is not None:
        print(f"the run is not finished: adapter of step {step}", file=sys.stderr)
    summary = run.read_json("summary.json") or {}
    return Source(run.config.model, run.config.trainer.precision, adapter, summary.get("system"))


def read_prompts(file: Path) -> list[list[dict[str, Any]]]:
    """Return the conversation before each answer that a file asks for.

    Args:
        file: .txt with a prompt a line, or .jsonl with prompt, input or messages.

    Returns:
        A conversation per prompt, in the order of the file.

    Raises:
        UserError: the file cannot be read, is empty, or a row has none of these.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {file} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--input {file} is empty")
    if file.suffix not in (".jsonl", ".json"):
        return [[{"role": "user", "content": line}] for _, line in numbered]
    return [_row_messages(line, f"{file}:{number}") for number, line in numbered]


def _row_messages(line: str, place: str) -> list[dict[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}")
    messages = row.get("messages")
    if isinstance(messages, list) and messages:
        # a training row ends with the answer that is now to be written
        return messages[:-1] if messages[-1].get("role") == "assistant" else messages
    prompt = row.get("prompt", row.get("input"))
    if isinstance(prompt, list) and prompt:
        return prompt
    if not isinstance(prompt, str):
        raise UserError(
            f"{place}: found the keys {', '.join(row) or '(none)'}",
            hint="a row has prompt, input or messages",
        )
    return [{"role": "user", "content": prompt}]


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Return the conversation, begun with the system message unless it has one of its own."""
    if system is None or messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
