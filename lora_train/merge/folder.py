"""What a merged model's folder holds besides the weights: configuration, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*",
)  # fmt: skip
# what must go along with a copy, and Python code that the configuration names
_OTHER_FILES = ("LICEN[CS]E*", "NOTICE*", "*USE_POLICY*", "PROVENANCE.json")


@dataclass(frozen=True)
class TokenFacts:
    """What a server must know of the tokenizer."""

    num_tokens: int
    """The highest id, and one."""
    has_chat_template: bool
    unknown_stop: tuple[str, int] | None
    """Token that ends a turn, and its id, if the base does not stop there; else None."""


def token_facts(tokenizer: Any, base: Path) -> TokenFacts:
    """Find out at which token an answer of the chat template ends, and whether servers stop there.

    Args:
        tokenizer: with the run's chat template.
        base: the base model's folder; its generation_config.json is read.

    Returns:
        The facts; a template that renders no plain question and answer tells of no token.
    """
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if tokenizer.chat_template is None:
        return TokenFacts(num_tokens, False, None)
    return TokenFacts(num_tokens, True, _unknown_stop(tokenizer, base))


def _unknown_stop(tokenizer: Any, base: Path) -> tuple[str, int] | None:
    answer = "42"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        # a template may refuse such a chat for reasons of its own; training has audited it
        return None
    ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False).input_ids
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop = next((index for index in ids if index in special), None)
    known = {tokenizer.eos_token_id, *_stop_ids(read_json(base / "generation_config.json"))}
    if stop is None or stop in known:
        return None
    return str(tokenizer.convert_ids_to_tokens(stop)), int(stop)


def write_files(
    config: Mapping[str, Any],
    base: Path,
    folder: Path,
    *,
    chat_template: str | None,
    facts: TokenFacts,
) -> None:
    """Write configuration and tokenizer of a merged model.

    The tokenizer's files are copied as they are: saved anew by this transformers, an older one, or
    a server with one, may not read them.

    Args:
        config: config.json of the merged model.
        base: the base model's folder.
        folder: where to.
        chat_template: the run's own, in place of the base's; None: the base's.
        facts: of the tokenizer; an end of turn that the base does not know is added to
            generation_config.json.

    Raises:
        OSError: the disk is full, or not writable.
    """
    patterns = [*_TOKENIZER_FILES, *_OTHER_FILES, *(["*.py"] if "auto_map" in config else [])]
    files = {file for pattern in patterns for file in base.glob(pattern) if file.is_file()}
    for file in sorted(files):
        # not shutil.copy: safetensors' and some hub files are readable by their owner alone
        shutil.copyfile(file, folder / file.name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        settings = read_json(folder / "tokenizer_config.json")
        if "chat_template" in settings:  # where older readers look
            settings["chat_template"] = chat_template
            _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "config.json", config)
    generation = read_json(base / "generation_config.json")
    if facts.unknown_stop is not None:
        stops = _stop_ids(generation) or _stop_ids(config)
        generation["eos_token_id"] = sorted({*stops, facts.unknown_stop[1]})
    if generation:
        _write_json(folder / "generation_config.json", generation)


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _stop_ids(config: Mapping[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
