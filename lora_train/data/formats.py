"""The forms a row may have, told apart by their keys, and one shape for each kind of example."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_train.data.messages import RowError, checked_messages, expect_text, is_answer, parse_json
from lora_train.errors import UserError

# in the order they are tried: alpaca rows on the hub often carry a ready-made `text` as well
_KEYS_BY_FORMAT = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "input_output": ("input", "output"),
    "text": ("text",),
}

_FORMS = (
    'messages: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}',
    'sharegpt: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}',
    'alpaca: {"instruction": ..., "input": ..., "output": ...}',
    'prompt_completion: {"prompt": ..., "completion": ...}',
    'input_output: {"input": ..., "output": ...}',
    'text: {"text": ...}',
)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the tokenizer's chat template."""

    messages: list[dict[str, Any]]
    """Messages with at least `role` and `content`."""
    supervised: tuple[int, ...]
    """Which messages are answers to be learned."""
    tools: list[Any] | None = None
    """Tool definitions for the template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables for the template, such as enable_thinking."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An Alpaca row: a chat if the tokenizer has a template, else Stanford's text."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class InputOutput:
    """A NeMo row: `{input} {output}`, its two fields tokenized one by one."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Raw text: the completion follows the prompt as it stands, without a separator."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text, all of it learned."""

    text: str


Example = Chat | Instruction | InputOutput | PromptCompletion | Text


def detect_format(keys: Iterable[str], where: str) -> str:
    """Tell the format of a dataset by the keys of a row.

    Args:
        keys: keys of the first row.
        where: the row's place, for the message.

    Returns:
        One of the values of `data.format`, without `auto`.

    Raises:
        UserError: no known form has these keys.
    """
    keys = [str(key) for key in keys]
    for name, needed in _KEYS_BY_FORMAT.items():
        if all(key in keys for key in needed):
            return name
    known = sorted({key for needed in _KEYS_BY_FORMAT.values() for key in needed})
    near = [
        f"{key!r} for {match[0]!r}"
        for key in keys
        if key not in known and (match := difflib.get_close_matches(key.lower(), known, n=1))
    ]
    found = ", ".join(repr(key) for key in keys) or "none"
    mend = f"did you mean {match_list(near)}? " if near else ""
    raise UserError(
        f"{where}: unknown form of a row; keys found: {found}; known forms:\n  "
        + "\n  ".join(_FORMS),
        hint=f"{mend}rename the keys to those of one form",
    )


def match_list(words: list[str]) -> str:
    """Join words as in a sentence: 'a', 'a or b', 'a, b or c'."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def normalize(row: Any, format_name: str, *, drop_nulls: bool = False) -> Example:
    """Check one row and bring it to the shape of its kind.

    Args:
        row: a decoded row.
        format_name: one of the values of `data.format`, without `auto`.
        drop_nulls: drop null values inside of messages; for rows from Arrow tables, whose structs
            give every message the keys of all others.

    Returns:
        The example.

    Raises:
        RowError: something is missing, of the wrong type or empty; it carries the place in the row.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected an object like {_form(format_name)}", found=row)
    # Arrow tables fill in null for a key that a row lacks
    keys = {key for key, value in row.items() if value is not None}
    if format_name == "messages" and "messages" not in keys and "conversations" in keys:
        name = "conversations"
    else:
        name = _KEYS_BY_FORMAT[format_name][0]
        _require(row, keys, format_name)
    if format_name in ("messages", "sharegpt"):
        return _chat(row, name, drop_nulls)
    if format_name == "alpaca":
        return _alpaca(row)
    if format_name == "prompt_completion":
        return _prompt_completion(row, drop_nulls)
    if format_name == "input_output":
        return InputOutput(
            expect_text(row["input"], ("input",)),
            expect_text(row["output"], ("output",), filled="answer"),
        )
    return Text(expect_text(row["text"], ("text",), filled="text"))


def answer_text(example: Example) -> str:
    """Return the reference for a generated answer: the output, or the last supervised message."""
    if isinstance(example, Chat):
        return example.messages[example.supervised[-1]]["content"]
    if isinstance(example, PromptCompletion):
        return example.completion
    return example.text if isinstance(example, Text) else example.output


def _require(row: dict[str, Any], keys: set[str], format_name: str) -> None:
    missing = [key for key in _KEYS_BY_FORMAT[format_name] if key not in keys]
    if not missing:
        return
    found = ", ".join(repr(str(key)) for key in row if key in keys) or "none"
    near = difflib.get_close_matches(missing[0], [str(key) for key in keys], n=1)
    mend = f"; did you mean {missing[0]!r} by {near[0]!r}?" if near else ""
    raise RowError(
        f"no key {match_list([repr(key) for key in missing])}; keys found: {found};"
        f" expected {_form(format_name)}{mend}"
    )


def _form(format_name: str) -> str:
    return next(form.split(": ", 1)[1] for form in _FORMS if form.startswith(f"{format_name}:"))


def _chat(row: dict[str, Any], key: str, drop_nulls: bool) -> Chat:
    messages, weights = checked_messages(row[key], (key,), drop_nulls=drop_nulls)
    if key == "conversations" and isinstance(row.get("system"), str) and row["system"].strip():
        messages = [{"role": "system", "content": row["system"]}, *messages]
        weights = [1, *weights]
    supervised = tuple(
        index
        for index, (message, weight) in enumerate(zip(messages, weights, strict=True))
        if is_answer(message) and weight
    )
    if not any(is_answer(message) for message in messages):
        raise RowError("no assistant turn; expected at least one answer to learn", path=(key,))
    if not supervised:
        raise RowError("every assistant turn has weight 0: nothing to learn", path=(key,))
    return Chat(messages, supervised, _tools(row), _template_kwargs(row))


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = parse_json(row.get("tools"), ("tools",))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("expected a list of tool definitions", path=("tools",), found=tools)
    return tools


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise RowError("expected an object", path=("chat_template_kwargs",), found=kwargs)
    return {key: value for key, value in kwargs.items() if value is not None}


def _alpaca(row: dict[str, Any]) -> Instruction:
    context = row.get("input")
    return Instruction(
        expect_text(row["instruction"], ("instruction",), filled="instruction"),
        "" if context is None else expect_text(context, ("input",)),
        expect_text(row["output"], ("output",), filled="answer"),
    )


def _prompt_completion(row: dict[str, Any], drop_nulls: bool) -> Chat | PromptCompletion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptCompletion(
            expect_text(prompt, ("prompt",)),
            expect_text(completion, ("completion",), filled="completion"),
        )
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowError(
            "prompt and completion must both be text or both be lists of messages",
            path=("completion",),
            found=completion if isinstance(prompt, list) else prompt,
        )
    before, _ = checked_messages(prompt, ("prompt",), drop_nulls=drop_nulls)
    after, weights = checked_messages(completion, ("completion",), drop_nulls=drop_nulls)
    supervised = tuple(
        len(before) + index
        for index, (message, weight) in enumerate(zip(after, weights, strict=True))
        if is_answer(message) and weight
    )
    if not supervised:
        raise RowError("no assistant turn to learn in the completion", path=("completion",))
    return Chat([*before, *after], supervised, _tools(row), _template_kwargs(row))
