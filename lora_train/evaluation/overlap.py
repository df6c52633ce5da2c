"""Which rows of an evaluation the model was trained on: then its figures say little."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from lora_train.config import Config
from lora_train.data.examples import read_sets
from lora_train.data.formats import Chat, Example, Text
from lora_train.data.messages import RowError
from lora_train.data.rendering import ChatRenderer, as_chat, raw_parts
from lora_train.data.sources import find_sources
from lora_train.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK = 1024


def rows_in_training(
    examples: Sequence[Example], config: Config, tokenizer: Any
) -> list[bool] | None:
    """Tell which rows ask what a training row asks, by their rendered prompts.

    Args:
        examples: the rows.
        config: the run; its training rows are read again.
        tokenizer: the model's, whose template renders both.

    Returns:
        For each row whether a training row has its prompt (of a chat: any turn of it; of plain
        text, the text); None, with a warning, where the training rows cannot be read any more.
    """
    seed = config.trainer.seed
    try:
        training, _ = read_sets(find_sources(config.data, seed), config.data, seed)
    except UserError as error:
        logger.warning(
            "whether rows are in the training data cannot be told, which cannot be read: %s",
            error.message,
        )
        return None
    logger.info("looking for these rows among %d of the training data", len(training.items))
    chats = ChatRenderer(tokenizer)
    known: set[bytes] = set()
    for begin in range(0, len(training.items), _CHUNK):
        for prompts in _prompts(training.items[begin : begin + _CHUNK], chats):
            known.update(prompts)
    found: list[bool] = []
    for begin in range(0, len(examples), _CHUNK):
        # the last turn is what the row is asked
        found += [
            bool(prompts) and prompts[-1] in known
            for prompts in _prompts(examples[begin : begin + _CHUNK], chats)
        ]
    return found


def _prompts(examples: Sequence[Example], chats: ChatRenderer) -> list[list[bytes]]:
    """Return hashes of each example's prompts, turn by turn; without those that are refused."""
    hashes: list[list[bytes]] = [[] for _ in examples]
    requests: list[tuple[Chat, int]] = []
    owners: list[int] = []
    for index, example in enumerate(examples):
        chat = as_chat(example, chats.tokenizer.chat_template is not None)
        if chat is not None:
            requests += [(chat, turn) for turn in chat.supervised]
            owners += [index] * len(chat.supervised)
            continue
        prompt, answer = raw_parts(example)
        is_whole = isinstance(example, Text) or not prompt.strip()
        hashes[index].append(_hash(prompt + answer if is_whole else prompt))
    for owner, text in zip(owners, chats.prompts(requests), strict=True):
        if not isinstance(text, RowError):
            hashes[owner].append(_hash(text))
    return hashes


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
