"""Checking a list of chat messages, in OpenAI's or ShareGPT's keys."""

from __future__ import annotations

import difflib
import json
from typing import Any

Path = tuple[str | int, ...]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_ROLE_OF_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_NAME_OF_TYPE = {
    "str": "the text",
    "int": "the number",
    "float": "the number",
    "list": "a list",
    "dict": "an object",
    "bool": "",
    "NoneType": "",
    "datetime": "a timestamp",
    "date": "a date",
    "time": "a time",
    "bytes": "bytes",
}


class RowError(ValueError):
    """What is wrong with one row.

    Args:
        message: what was expected; lower case, no full stop.
        path: keys and indexes from the row down to the value in question.
        found: the value found; left out if the message says all.
    """

    _NOTHING = object()

    def __init__(self, message: str, *, path: Path = (), found: Any = _NOTHING) -> None:
        name = _dotted(path)
        text = f"{name}: {message}" if name else message
        super().__init__(text if found is self._NOTHING else f"{text}; found {describe(found)}")
        self.path = path


def describe(value: Any) -> str:
    """Name a value for a message: its kind, and itself if it is short."""
    kind = _NAME_OF_TYPE.get(type(value).__name__, type(value).__name__)
    if isinstance(value, list | dict | bytes):
        return kind if value else f"{kind} that is empty".replace("bytes that is", "bytes that are")
    shown = json.dumps(value) if value is None or isinstance(value, str | bool) else str(value)
    return f"{kind} {shown if len(shown) <= 40 else shown[:37] + '...'}".strip()


def expect_text(value: Any, path: Path, *, filled: str | None = None) -> str:
    """Return the value if it is text that a tokenizer can take.

    Args:
        value: the value found.
        path: its place in the row.
        filled: what the text is, if it must not be blank.

    Returns:
        The text, unchanged.

    Raises:
        RowError: not text, blank, or not Unicode.
    """
    if not isinstance(value, str):
        raise RowError("expected text", path=path, found=value)
    if filled is not None and not value.strip():
        raise RowError(f"empty {filled}", path=path)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            # the readers decode with surrogateescape, which maps a stray byte b to U+DC00 + b
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
            raise RowError(f"not valid UTF-8: {what}", path=path) from None
    return value


def parse_json(value: Any, path: Path) -> Any:
    """Decode a value that CSV and Parquet files hold as JSON text; other values pass unchanged.

    Args:
        value: the value found.
        path: its place in the row.

    Returns:
        The decoded value; None for blank text.

    Raises:
        RowError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"invalid JSON inside of the text: {error}", path=path) from None


def is_answer(message: dict[str, Any]) -> bool:
    """Tell whether a checked message is an assistant turn."""
    return message["role"] == "assistant"


def checked_messages(
    value: Any, path: Path, *, drop_nulls: bool
) -> tuple[list[dict[str, Any]], list[int]]:
    """Check a conversation and bring it to `role` and `content`.

    Args:
        value: the conversation found; a list, or the JSON text of one.
        path: its place in the row.
        drop_nulls: drop null values below the messages' own keys as well.

    Returns:
        The messages, and for each its weight: 0 if it says so (OpenAI's `weight`), else 1.

    Raises:
        RowError: a message is not what a template can render or a model can learn.
    """
    messages = parse_json(value, path)
    if not isinstance(messages, list):
        raise RowError("expected a list of messages", path=path, found=messages)
    if not messages:
        raise RowError("empty list of messages", path=path)
    checked, weights = [], []
    for index, message in enumerate(messages):
        here = (*path, index)
        if not isinstance(message, dict):
            raise RowError(
                'expected a message like {"role": ..., "content": ...}', path=here, found=message
            )
        # datasets gives every message the keys of all others, filled with null
        message = {key: item for key, item in message.items() if item is not None}
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise RowError("expected weight 0 or 1", path=(*here, "weight"), found=weight)
        checked.append(_checked_message(message, here, drop_nulls))
        weights.append(int(weight))
    return checked, weights


def _checked_message(message: dict[str, Any], here: Path, drop_nulls: bool) -> dict[str, Any]:
    if "from" in message and "role" not in message:
        role_key, content_key = "from", "value"
        role = _ROLE_OF_SHAREGPT.get(str(message["from"]).lower())
        known: tuple[str, ...] = tuple(_ROLE_OF_SHAREGPT)
    else:
        role_key, content_key = "role", "content"
        found = message.get("role")
        role = found if found in ROLES else None
        known = ROLES
    if role_key not in message:
        keys = ", ".join(repr(key) for key in message) or "none"
        raise RowError(f'no key "role"; keys found: {keys}', path=here)
    if role is None:
        raise RowError(
            f"unknown role; expected {', '.join(known)}{_nearest_role(message[role_key], known)}",
            path=(*here, role_key),
            found=message[role_key],
        )
    rest = {
        key: _without_nulls(item) if drop_nulls else item
        for key, item in message.items()
        if key not in (role_key, content_key)
    }
    calls = bool(rest.get("tool_calls") or rest.get("function_call"))
    if content_key not in message and not calls:
        raise RowError(f'no key "{content_key}"', path=here)
    # an OpenAI message that only calls a tool has null content, which templates print as None
    content = _text_of(message.get(content_key, ""), (*here, content_key))
    if role == "assistant" and not content.strip() and not calls:
        raise RowError("empty answer", path=(*here, content_key))
    return {"role": role, "content": content, **rest}


def _text_of(content: Any, path: Path) -> str:
    if not isinstance(content, list):
        return expect_text(content, path)
    texts = []
    for index, part in enumerate(content):
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        if part.get("type", "text") != "text":
            raise RowError(
                "only text can be learned", path=(*path, index, "type"), found=part["type"]
            )
        texts.append(expect_text(part.get("text"), (*path, index, "text")))
    return "".join(texts)


def _nearest_role(found: Any, known: tuple[str, ...]) -> str:
    word = str(found).lower()
    near = difflib.get_close_matches(word, known, n=1)
    mapped = near[0] if near else _ROLE_OF_SHAREGPT.get(word)
    return f" (did you mean {mapped!r}?)" if mapped in known else ""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
