"""The one door to the data: a configuration and a tokenizer in, packed and labelled tokens out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lora_train.config import Config, DataConfig
from lora_train.data.examples import Examples, held_out_name, read_sets
from lora_train.data.messages import RowError
from lora_train.data.overlong import LengthLimit, fit
from lora_train.data.packing import Packs, fill_rate, one_per_pack, pack_best_fit
from lora_train.data.prepared_cache import load_prepared, save_prepared
from lora_train.data.rendering import ChatRenderer, render_examples
from lora_train.data.sources import Sources, find_sources
from lora_train.data.tokenized_set import DataReport, PreparedData, SetReport, TokenizedSet
from lora_train.data.tokenizing import ExampleTokenizer, Tokenized
from lora_train.paths import cache_dir

__all__ = ["PreparedData", "TokenizedSet", "prepare_data"]

logger = logging.getLogger(__name__)

# raise it when the same input gives other tokens, labels or packs than before
_FORMAT_VERSION = 1
# examples rendered and tokenized at once: enough to keep the Rust threads busy, few MB of text
_CHUNK = 1024


def prepare_data(config: Config, tokenizer: Any, *, max_positions: int | None) -> PreparedData:
    """Read, check, render, tokenize and pack the data; or take all that from the cache.

    Any number of processes may call it at once. On a cluster let one process of a node call it
    first: the others then find the cache.

    Args:
        config: the whole configuration; `data` and `trainer.seed` are read.
        tokenizer: the model's tokenizer, with the chat template to use.
        max_positions: the longest sequence the model can take, in tokens; None if it has no limit.

    Returns:
        Memory-mapped sets, packs and the report.

    Raises:
        UserError: the data cannot be found or used; says where and what was expected.
    """
    data, seed = config.data, config.trainer.seed
    example_tokenizer = ExampleTokenizer(tokenizer, add_bos=data.add_bos)
    limit = LengthLimit.of(data, max_positions)
    sources = find_sources(data, seed)
    content_hash = _content_hash(sources, data, seed, limit, tokenizer, example_tokenizer)
    folder = cache_dir() / "prepared" / content_hash
    cached = load_prepared(folder)
    if cached is not None:
        logger.info("prepared data from %s", folder)
        return _named(cached, sources)

    start = time.monotonic()
    train, validation = read_sets(sources, data, seed)
    chats = ChatRenderer(tokenizer, learn_everything=data.train_on == "all")
    train_set, train_packs, train_report = _prepare_set(
        train, data, seed, limit, chats, example_tokenizer
    )
    notes = _notes(chats)
    validation_set = validation_packs = validation_report = None
    if validation is not None:
        validation_set, validation_packs, validation_report = _prepare_set(
            validation, data, seed, limit, chats, example_tokenizer
        )
    report = DataReport(train.format_name, data.seq_length, train_report, validation_report, notes)
    prepared = PreparedData(
        train_set, train_packs, validation_set, validation_packs, report, content_hash, sources
    )
    logger.info("prepared the data in %.1f s", time.monotonic() - start)
    try:
        save_prepared(prepared, folder)
    except OSError as error:
        logger.warning(
            "cannot keep the prepared data in %s: %s; going on from memory", folder, error
        )
        return prepared
    # from the cache even now: all processes of a node then share the same pages
    kept = load_prepared(folder)
    return prepared if kept is None else dataclasses.replace(kept, sources=sources)


def _named(cached: PreparedData, sources: Sources) -> PreparedData:
    """Return cached data with this run's sources and names; copies of a file share a hash."""
    report = cached.report
    train = dataclasses.replace(report.train, source=sources.train.name)
    validation = report.validation
    if validation is not None:
        named = sources.validation
        source = named.name if named is not None else held_out_name(sources.train.name)
        validation = dataclasses.replace(validation, source=source)
    report = dataclasses.replace(report, train=train, validation=validation)
    return dataclasses.replace(cached, report=report, sources=sources)


def _prepare_set(
    examples: Examples,
    data: DataConfig,
    seed: int,
    limit: LengthLimit,
    chats: ChatRenderer,
    tokenizer: ExampleTokenizer,
) -> tuple[TokenizedSet, Packs, SetReport]:
    errors: list[tuple[int, RowError]] = []
    pending: list[Future[list[Tokenized]]] = []
    # the tokenizer works outside of Python: one chunk is tokenized while the next is rendered
    with ThreadPoolExecutor(max_workers=1) as pool:
        for begin in range(0, len(examples.items), _CHUNK):
            rendered = render_examples(examples.items[begin : begin + _CHUNK], chats)
            texts = []
            for index, item in enumerate(rendered, begin):
                if isinstance(item, RowError):
                    errors.append((index, item))
                else:
                    texts += item
            if not errors:
                pending.append(pool.submit(tokenizer.tokenize, texts))
        examples.refuse(errors)
        sequences = [sequence for chunk in pending for sequence in chunk.result()]

    fitted = fit(sequences, data, limit, examples)
    if data.train_on == "all":
        fitted = dataclasses.replace(
            fitted,
            kept=[Tokenized(one.tokens, np.ones_like(one.supervised)) for one in fitted.kept],
        )
    tokenized = TokenizedSet.of(fitted.kept)
    packs = (
        pack_best_fit(tokenized.lengths, data.seq_length, seed)
        if data.packed_sequence
        else one_per_pack(len(tokenized))
    )
    report = SetReport(
        source=examples.name,
        num_rows=len(examples.items),
        num_examples=len(tokenized),
        num_dropped=fitted.num_dropped,
        num_truncated=fitted.num_truncated,
        num_tokens=len(tokenized.tokens),
        num_supervised=int(tokenized.supervised.sum()),
        longest=int(tokenized.lengths.max()),
        num_packs=len(packs),
        fill_rate=fill_rate(packs, tokenized.lengths, data.seq_length),
    )
    return tokenized, packs, report


def _notes(chats: ChatRenderer) -> tuple[str, ...]:
    notes = []
    if chats.num_split_by_turn:
        notes.append(
            f"{chats.num_split_by_turn} conversations became one sequence per answer: the chat"
            " template renders earlier turns differently once later ones follow"
        )
    if chats.unlearned_prompt:
        notes.append(
            f"the chat template prompts with {chats.unlearned_prompt!r}, which its rendered answers"
            " do not start with: answers are learned without it"
        )
    return tuple(notes)


def _content_hash(
    sources: Sources,
    data: DataConfig,
    seed: int,
    limit: LengthLimit,
    tokenizer: Any,
    example_tokenizer: ExampleTokenizer,
) -> str:
    """Hash all that determines tokens, labels and packs; no path is in it, so a copy hits too."""
    import transformers

    content = {
        "format_version": _FORMAT_VERSION,
        "transformers": transformers.__version__,
        "train": sources.train.content_hash(),
        "validation": sources.validation.content_hash() if sources.validation else None,
        "held_out_fraction": sources.held_out_fraction,
        "options": [
            getattr(data, key)
            for key in ("format", "train_on", "seq_length", "packed_sequence", "overlong")
        ],
        "bos": example_tokenizer.bos,
        "limit": limit.tokens,
        "seed": seed,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
