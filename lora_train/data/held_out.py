"""Held-out examples as inference would meet them: the prompt, and the answer it should get."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from lora_train.config import Config
from lora_train.data.examples import read_validation
from lora_train.data.formats import Chat, Example, Text, answer_text
from lora_train.data.messages import RowError
from lora_train.data.rendering import ChatRenderer, as_chat, raw_parts
from lora_train.data.sources import find_sources
from lora_train.data.tokenizing import ExampleTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutExample:
    """A validation example, cut before its final answer."""

    prompt: str
    """The question as a person reads it: the last message before the answer, or the raw input."""
    prompt_ids: list[int]
    """The whole prompt as inference gives it to the model."""
    system: str | None
    """The system message it begins with, if any."""
    reference: str
    """The final assistant turn, the output or the completion."""


def held_out_examples(config: Config, tokenizer: Any, limit: int) -> list[HeldOutExample]:
    """Return the first validation examples whose prompt fits `data.seq_length`.

    Args:
        config: the whole configuration; `data` and `trainer.seed` are read.
        tokenizer: the model's tokenizer.
        limit: most examples.

    Returns:
        At most `limit` examples; none without validation data or for plain text.

    Raises:
        UserError: as `prepare_data`.
    """
    data, seed = config.data, config.trainer.seed
    if limit == 0:
        return []
    validation = read_validation(find_sources(data, seed), data, seed)
    if validation is None:
        return []
    example_tokenizer = ExampleTokenizer(tokenizer, add_bos=data.add_bos)
    chats = ChatRenderer(tokenizer)
    found: list[HeldOutExample] = []
    for index, example in enumerate(validation.items):
        if len(found) == limit:
            break
        if isinstance(example, Text):
            logger.warning("plain text has no prompts to answer: no answers are generated")
            return []
        try:
            asked = as_held_out(example, chats, example_tokenizer)
        except RowError as error:
            validation.refuse([(index, error)])
        if len(asked.prompt_ids) < data.seq_length:
            found.append(asked)
    return found


def as_held_out(
    example: Example, chats: ChatRenderer, tokenizer: ExampleTokenizer
) -> HeldOutExample:
    """Cut an example before its final answer.

    Args:
        example: a checked example that is no plain text.
        chats: renders those that are chats.
        tokenizer: makes the tokens.

    Returns:
        What inference is given, and what it should answer.

    Raises:
        RowError: the chat template refuses the conversation.
    """
    chat = as_chat(example, chats.tokenizer.chat_template is not None)
    system = None
    if isinstance(chat, Chat):
        turn = chat.supervised[-1]
        prompt = chats.prompt(chat, turn)
        question = str(chat.messages[turn - 1]["content"]) if turn else ""
        if chat.messages[0]["role"] == "system":
            system = str(chat.messages[0]["content"])
    else:
        prompt, _ = raw_parts(example)
        question = prompt
    ids = tokenizer.prompt_ids(prompt, is_chat=chat is not None)
    return HeldOutExample(question, list(ids), system, answer_text(example))
