"""What a model is evaluated on: rows as the run would have trained on them, with their references.

Read without torch, so that a bad row is refused at once; rendered and tokenized as in training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_train.config import Config
from lora_train.data.examples import Examples, read_examples, read_validation
from lora_train.data.formats import Text
from lora_train.data.held_out import as_held_out
from lora_train.data.messages import RowError
from lora_train.data.overlong import TRUNCATABLE, LengthLimit, truncated
from lora_train.data.packing import Packs, one_per_pack, pack_best_fit
from lora_train.data.rendering import ChatRenderer, Rendered, render_examples
from lora_train.data.sources import find_sources, find_split
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.data.tokenizing import ExampleTokenizer, Tokenized
from lora_train.errors import UserError
from lora_train.evaluation.references import WithSquadRows, references_of

# rows rendered in one call of the chat template
_CHUNK = 1024


@dataclass(frozen=True)
class Questions:
    """Checked rows, not rendered yet."""

    examples: Examples
    """The rows."""
    references: list[tuple[str, ...]]
    """For each row the answers that are right; none where no answers are generated."""
    is_held_out: bool
    """Whether they are what the run itself validates on."""
    num_read: int
    """Rows of the source, before `limit`."""

    @property
    def are_answered(self) -> bool:
        """Whether answers are generated for them."""
        return any(self.references)

    def describe(self) -> str:
        """Return where they come from, and how many of them are taken."""
        count = len(self.examples.items)
        which = (
            f"all {count}" if count == self.num_read else f"the first {count} of {self.num_read}"
        )
        held_out = ", which the run validates on" if self.is_held_out else ""
        return f"{which} rows of {self.examples.name}{held_out}"


@dataclass(frozen=True)
class Row:
    """A row as it is measured."""

    place: str
    """File and line, for messages."""
    prompt: str
    """The question as a person reads it; a plain text's beginning."""
    prompt_ids: list[int] | None
    """What inference gives to the model; None: no answer is generated."""
    references: tuple[str, ...]
    """The answers that are right."""
    sequences: tuple[int, ...]
    """Its sequences in the set, mostly one; none where all are too long."""


@dataclass(frozen=True)
class EvaluationRows:
    """Rendered and tokenized rows."""

    rows: list[Row]
    """In the order of the source."""
    sequences: TokenizedSet
    """Their training sequences, with the tokens that count in the loss."""
    packs: Packs
    """How those are packed: as the run packs its validation set."""
    limit: LengthLimit
    """The longest sequence."""
    num_too_long: int
    """Rows of which at least one sequence was left out for its length."""
    num_cut: int
    """Rows whose input was cut for their length, as data.overlong=truncate asks."""

    def fingerprint(self) -> str:
        """Hash the tokens, labels, prompts and references."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.sequences.tokens, self.sequences.supervised, self.sequences.offsets):
            digest.update(np.ascontiguousarray(array).data)
        asked = [[row.prompt_ids, row.references, row.sequences] for row in self.rows]
        digest.update(json.dumps(asked).encode())
        return digest.hexdigest()


def read_questions(
    config: Config,
    *,
    data: str | None,
    subset: str | None = None,
    split: str | None,
    limit: int | None,
    with_answers: bool,
) -> Questions:
    """Read and check the rows to evaluate on.

    Args:
        config: the run; says how rows are read, and what it validates on.
        data: file, folder or hub dataset. None: the run's own.
        subset: configuration of a hub dataset that has several.
        split: its split. None: test or validation; without `data` what the run validates on.
        limit: most rows, from the first on. None: all.
        with_answers: whether answers will be generated, for which each row needs a reference.

    Returns:
        The rows.

    Raises:
        UserError: they cannot be found, a row is bad, or one has no answer to compare with.
    """
    seed = config.trainer.seed
    is_held_out = data is None and split is None
    if is_held_out:
        try:
            sources = find_sources(config.data, seed)
        except UserError as error:
            raise UserError(
                f"the rows that the run validates on are not here: {error.message}",
                hint="--data FILE names others; a relative path in the run's config.yaml starts "
                "where the run was started",
            ) from error
        found = read_validation(sources, config.data, seed)
        if found is None:
            raise UserError(
                "the run holds no rows out (data.validation_size=0 and no validation split)",
                hint="--data FILE names rows to evaluate on",
            )
        examples = found
    else:
        section = config.data
        if data is not None:
            section = dataclasses.replace(section, path=data, subset=subset, revision=None)
        try:
            source = find_split(section, split, seed)
        except UserError as error:
            raise _in_words_of_command(error, section.path) from error
        name = "auto" if data is not None else section.format
        examples = read_examples(WithSquadRows(source.name, source.files, source.table), name)
    num_read = len(examples.items)
    if limit is not None:
        examples = examples.subset(np.arange(min(limit, num_read)))
    references: list[tuple[str, ...]] = [()] * len(examples.items)
    if with_answers and examples.format_name != "text":
        references = references_of(examples)
    return Questions(examples, references, is_held_out, num_read)


def _in_words_of_command(error: UserError, path: str) -> UserError:
    """Return an error about data.path as one about --data."""

    def said(text: str) -> str:
        for key, option in (("data.path", "--data"), ("data.subset", "--subset")):
            text = text.replace(f"{key}=", f"{option} ").replace(key, option)
        return text

    hint = error.hint and said(error.hint)
    if hint and "lora-train prefetch" in hint and path != "squad":
        # that fetches what a run trains on
        hint = (
            "on a node with network, once and with the same HF_HOME: HF_HUB_OFFLINE=0 hf download "
            f"--repo-type dataset {path}"
        )
    return UserError(said(error.message), hint=hint)


def render_rows(
    questions: Questions, config: Config, tokenizer: Any, *, max_positions: int | None
) -> EvaluationRows:
    """Render, label, tokenize and pack the rows as the run does.

    Args:
        questions: the rows.
        config: the run; `data` and `trainer.seed` are read.
        tokenizer: the model's.
        max_positions: the longest sequence that the model can take; None: no limit.

    Returns:
        The rows; what is too long is left out of them, or cut where data.overlong=truncate.

    Raises:
        UserError: the chat template refuses a row, or no row is short enough.
    """
    data, examples = config.data, questions.examples
    limit = LengthLimit.of(data, max_positions)
    tokens_of = ExampleTokenizer(tokenizer, add_bos=data.add_bos)
    rendered = _rendered(examples, ChatRenderer(tokenizer, data.train_on == "all"))
    whole = iter(tokens_of.tokenize([text for texts in rendered for text in texts]))
    may_cut = data.overlong == "truncate" and examples.format_name in TRUNCATABLE
    prompts = ChatRenderer(tokenizer)
    kept: list[Tokenized] = []
    rows: list[Row] = []
    errors: list[tuple[int, RowError]] = []
    num_too_long = num_cut = longest = 0
    for index, texts in enumerate(rendered):
        sequences = [next(whole) for _ in texts]
        longest = max(longest, *(len(one.tokens) for one in sequences))
        places, is_cut = [], False
        for one in sequences:
            fitting: Tokenized | None = one
            if len(one.tokens) > limit.tokens:
                fitting = truncated(one, limit.tokens) if may_cut else None
                is_cut |= fitting is not None
            if fitting is not None:
                places.append(len(kept))
                kept.append(fitting)
        num_too_long += len(places) < len(sequences)
        num_cut += is_cut
        try:
            prompt, ids = _prompt(questions, index, prompts, tokens_of, limit)
        except RowError as error:
            errors.append((index, error))
            continue
        if is_cut and questions.references[index]:
            # as it was trained: asked for the answer to what is left of the input
            ids = kept[places[-1]].tokens[: int(np.argmax(kept[places[-1]].supervised))].tolist()
        file, place = examples.origins[index]
        rows.append(
            Row(
                f"{file.name}:{file.numbers[place]}",
                prompt,
                ids,
                questions.references[index],
                tuple(places),
            )
        )
    examples.refuse(errors)
    if not kept:
        raise UserError(
            f"no row fits {limit.source}={limit.tokens} tokens; the longest has {longest}",
            hint=f"--seq-length {-(-longest // 64) * 64}"
            if max_positions is None or longest <= max_positions
            else f"the model has {max_positions} positions: shorter rows",
        )
    if data.train_on == "all":
        kept = [Tokenized(one.tokens, np.ones_like(one.supervised)) for one in kept]
    tokenized = TokenizedSet.of(kept)
    packs = (
        pack_best_fit(tokenized.lengths, data.seq_length, config.trainer.seed)
        if data.packed_sequence
        else one_per_pack(len(tokenized))
    )
    return EvaluationRows(rows, tokenized, packs, limit, num_too_long, num_cut)


def _rendered(examples: Examples, chats: ChatRenderer) -> list[list[Rendered]]:
    errors: list[tuple[int, RowError]] = []
    rendered: list[list[Rendered]] = []
    for begin in range(0, len(examples.items), _CHUNK):
        items = render_examples(examples.items[begin : begin + _CHUNK], chats)
        for index, item in enumerate(items, begin):
            if isinstance(item, RowError):
                errors.append((index, item))
            else:
                rendered.append(item)
    examples.refuse(errors)
    return rendered


def _prompt(
    questions: Questions,
    index: int,
    chats: ChatRenderer,
    tokens_of: ExampleTokenizer,
    limit: LengthLimit,
) -> tuple[str, list[int] | None]:
    """Return a row's question, and its prompt's tokens where it is to be answered and fits."""
    example = questions.examples.items[index]
    if isinstance(example, Text):
        return example.text, None
    asked = as_held_out(example, chats, tokens_of)
    is_answered = bool(questions.references[index])
    fits = 0 < len(asked.prompt_ids) < limit.tokens
    return asked.prompt, asked.prompt_ids if is_answered and fits else None
