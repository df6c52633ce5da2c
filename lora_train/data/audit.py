"""The label audit: what the model will learn, checked and shown before the first step.

Labels never depend on ids: many tokenizers have pad == eos, and masking pads would mask the end of
every answer. So here the other way round: every answer must end in a token at which generation
stops, and that token must be learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_train.config import Config
from lora_train.data.prepared import PreparedData, TokenizedSet
from lora_train.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_MARKS = (">>>", "<<<")
_LONGEST_SHOWN = 1600
# templates may write blanks, and Llama-3 a header, after the last end of turn
_TAIL_TOKENS = 4


@dataclass(frozen=True)
class Audit:
    """An audit that found nothing to refuse. Print it with rich, or take `text()`."""

    example: tuple[tuple[str, bool], ...]
    """One training example: pieces of text, and whether each is learned."""
    summary: str
    """Counts."""
    warnings: tuple[str, ...]
    """What is odd, but may be meant."""

    def text(self) -> str:
        """Return the audit without colours: what is learned stands between >>> and <<<."""
        return "\n".join(
            [self._head(f"between {_MARKS[0]} and {_MARKS[1]}"), self._marked(), *self._tail()]
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.text import Text

        if not console.is_terminal or console.no_color or console.color_system is None:
            yield Text(self.text())
            return
        shown = Text()
        for piece, learned in self.example:
            shown.append(piece, style="bold green" if learned else "dim")
        yield Text(self._head("in green"))
        yield shown
        for line in self._tail():
            yield Text(line, style="yellow" if line.startswith("warning") else "")

    def _head(self, how: str) -> str:
        return f"one training example; learned is what stands {how}:"

    def _marked(self) -> str:
        return "".join(
            f"{_MARKS[0]}{piece}{_MARKS[1]}" if learned else piece
            for piece, learned in self.example
        )

    def _tail(self) -> list[str]:
        return [self.summary, *(f"warning: {warning}" for warning in self.warnings)]


def audit(prepared: PreparedData, tokenizer: Any, config: Config) -> Audit:
    """Check the labels of every example.

    Args:
        prepared: the prepared data.
        tokenizer: the tokenizer it was made with.
        config: the whole configuration.

    Returns:
        One example with its learned tokens marked, counts and warnings.

    Raises:
        UserError: an example has nothing to learn, an answer has no end that is learned (or was cut
            away with it), or a text begins with BOS twice.
    """
    stops = _stop_ids(tokenizer)
    special = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    } | stops
    sets = {"training": prepared.train}
    if prepared.validation is not None:
        sets["validation"] = prepared.validation
    warnings: list[str] = []
    for name, examples in sets.items():
        _check_something_learned(examples, name)
        _check_bos(examples, name, tokenizer)
        ends = _ends(examples, whole=config.data.train_on == "all", ids=special)
        _check_ends(examples, ends, name, special, tokenizer)
        warnings += _odd_ends(examples, ends, name, stops, tokenizer)
    report = prepared.report.train
    summary = (
        f"{report.num_examples:,} training examples, {report.num_tokens:,} tokens,"
        f" {report.num_supervised / report.num_tokens:.1%} of them learned"
    )
    return Audit(_pieces(*prepared.train[0], tokenizer), summary, tuple(warnings))


def _check_something_learned(examples: TokenizedSet, name: str) -> None:
    # the first token of an example has nothing before it that could predict it
    learned = examples.supervised.copy()
    learned[examples.offsets[:-1]] = False
    counts = np.add.reduceat(learned, examples.offsets[:-1], dtype=np.int64)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise UserError(
            f"{len(empty)} of {len(examples)} {name} examples have no token to learn; the first of"
            f" them is example {empty[0]} with {examples.lengths[empty[0]]} tokens",
            hint="look at these rows: an answer must follow the prompt; data.train_on=all learns"
            " every token",
        )


def _check_bos(examples: TokenizedSet, name: str, tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    starts = examples.offsets[:-1][examples.lengths > 1]
    twice = (examples.tokens[starts] == bos) & (examples.tokens[starts + 1] == bos)
    if twice.any():
        raise UserError(
            f"{int(twice.sum())} of {len(examples)} {name} examples begin with"
            f" {tokenizer.bos_token!r} twice",
            hint="take it out of the texts or of the chat template: one of both adds a second one",
        )


def _ends(examples: TokenizedSet, *, whole: bool, ids: set[int]) -> np.ndarray:
    """Find the last token of every learned span: places in the flat arrays, int64.

    With `train_on=all` the span is the whole example, and blanks of the template may follow its
    end: then the last token of `ids` near its end counts.
    """
    last = examples.offsets[1:] - 1
    if not whole:
        ends = examples.supervised.copy()
        ends[:-1] &= ~examples.supervised[1:]
        ends[last] = examples.supervised[last]
        return np.flatnonzero(ends)
    found = last.copy()
    wanted = np.fromiter(ids, dtype=np.int64)
    for back in range(_TAIL_TOKENS - 1, -1, -1):
        places = np.maximum(last - back, examples.offsets[:-1])
        found = np.where(np.isin(examples.tokens[places], wanted), places, found)
    return found


def _check_ends(
    examples: TokenizedSet, ends: np.ndarray, name: str, special: set[int], tokenizer: Any
) -> None:
    wanted = np.fromiter(special, dtype=np.int64)
    bad = ends[~np.isin(examples.tokens[ends], wanted)]
    if len(bad) == 0:
        return
    first = int(np.searchsorted(examples.offsets, bad[0], side="right")) - 1
    begin = max(int(examples.offsets[first]), int(bad[0]) - 11)
    tail = tokenizer.decode(examples.tokens[begin : bad[0] + 1])
    raise UserError(
        f"{len(bad)} of {len(ends)} answers in the {name} examples end without an end-of-turn token"
        f" that is learned, so the model would not learn to stop; example {first} ends in {tail!r}",
        hint="the chat template must write eos_token or an end of turn after each answer:"
        " model.chat_template=FILE, or the model's -Instruct variant",
    )


def _odd_ends(
    examples: TokenizedSet, ends: np.ndarray, name: str, stops: set[int], tokenizer: Any
) -> list[str]:
    ids, counts = np.unique(examples.tokens[ends], return_counts=True)
    odd = [
        f"{tokenizer.convert_ids_to_tokens(int(index))} ({count})"
        for index, count in zip(ids, counts, strict=True)
        if int(index) not in stops
    ]
    if not odd:
        return []
    known = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops))) or "nothing"
    return [
        f"{name} answers end in {', '.join(odd)}, but generation stops at {known}: tell the server"
        " to stop there too, or use a template whose end of turn is the tokenizer's eos_token"
    ]


def _stop_ids(tokenizer: Any) -> set[int]:
    """Return the ids at which generation stops: the tokenizer's EOS and the generation config's."""
    found = {tokenizer.eos_token_id}
    file = Path(tokenizer.name_or_path) / "generation_config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(tokenizer.name_or_path, "generation_config.json")
        except HFValidationError:
            cached = None
        file = Path(cached) if isinstance(cached, str) else file
    if file.is_file():
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(eos) if isinstance(eos, list) else {eos}
    return {index for index in found if index is not None}


def _pieces(
    tokens: np.ndarray, supervised: np.ndarray, tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """Cut an example where learning starts and stops, and shorten what is very long."""
    bounds = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(tokens)]
    pieces = []
    before = ""
    for begin, end in zip(bounds, bounds[1:], strict=False):
        # some tokenizers drop the blank before a piece that is decoded alone
        upto = tokenizer.decode(tokens[:end])
        alone = tokenizer.decode(tokens[begin:end])
        pieces.append(
            (
                _shortened(upto[len(before) :] if upto.startswith(before) else alone),
                bool(supervised[begin]),
            )
        )
        before = upto
    return tuple(pieces)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_SHOWN:
        return text
    left_out = len(text) - 1200
    return f"{text[:800]}\n[... {left_out:,} characters ...]\n{text[-400:]}"
