"""From text with marked characters to tokens with marked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_train.data.rendering import Rendered
from lora_train.errors import UserError


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One sequence of tokens."""

    tokens: np.ndarray
    """Token ids, (T,) int32."""
    supervised: np.ndarray
    """Whether each token is to be learned, (T,) bool."""


class ExampleTokenizer:
    """Tokenizes rendered examples, many at once, and finds the tokens of their answers.

    Args:
        tokenizer: a transformers tokenizer with a Rust backend.
        add_bos: whether raw text begins with BOS. None: as the tokenizer does.

    Raises:
        UserError: the tokenizer has no Rust backend, or lacks a token that is needed.
    """

    def __init__(self, tokenizer: Any, *, add_bos: bool | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} is a {type(tokenizer).__name__}, which"
                " cannot tell which characters a token stands for",
                hint="use a model with a tokenizer.json",
            )
        # a padded or cut batch earlier in this process leaves these on in the backend
        backend.no_truncation()
        backend.no_padding()
        self._encode = backend.encode_batch
        self._eos: int | None = tokenizer.eos_token_id
        self._name = tokenizer.name_or_path
        self.bos = bos_of(tokenizer, add_bos)
        """BOS id that raw text begins with, or None."""
        x_y, x, y = (self._ids(text) for text in ("x y", "x", "y"))
        # as NeMo tells it: where "y" alone already has its blank, " y" would have two
        self._blank_is_extra = x_y == x + y
        self._adds_blank = self._ids("\ny")[len(self._ids("\n")) :] != y

    def _ids(self, text: str) -> list[int]:
        return self._encode([text], add_special_tokens=False)[0].ids

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Tokenized]:
        """Tokenize texts.

        Args:
            rendered: texts with the characters to be learned.

        Returns:
            For each text its tokens, in order.

        Raises:
            UserError: raw text and a tokenizer without EOS.
        """
        joint = [item for item in rendered if not item.is_split]
        encodings = iter(self._encode([item.text for item in joint], add_special_tokens=False))
        apart = iter(self._answers_apart([item for item in rendered if item.is_split]))
        result = []
        for item in rendered:
            if item.is_split:
                tokens, supervised = next(apart)
            else:
                tokens, supervised = self._marked(next(encodings), item)
            result.append(
                Tokenized(tokens, supervised) if item.is_chat else self._framed(tokens, supervised)
            )
        return result

    def prompt_ids(self, prompt: str, *, is_chat: bool) -> list[int]:
        """Tokenize the text before an answer, as inference would."""
        ids = self._ids(prompt)
        starts = is_chat or self.bos is None or ids[:1] == [self.bos]
        return ids if starts else [self.bos, *ids]  # type: ignore[list-item]

    def _framed(self, tokens: np.ndarray, supervised: np.ndarray) -> Tokenized:
        """Add BOS, which is given, and EOS, which is learned, unless the text has them."""
        if self._eos is None:
            raise UserError(
                f"the tokenizer of {self._name} has no end-of-sequence token: a model trained on"
                " this raw text would never stop",
                hint="use a chat format, or a tokenizer with eos_token",
            )
        head: list[int] = []
        if self.bos is not None and (len(tokens) == 0 or tokens[0] != self.bos):
            head = [self.bos]
        tail = [self._eos] if len(tokens) == 0 or tokens[-1] != self._eos else []
        return Tokenized(
            np.concatenate([head, tokens, tail]).astype(np.int32),
            np.concatenate([[False] * len(head), supervised, [True] * len(tail)]).astype(bool),
        )

    def _answers_apart(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenize prompt and answer one by one, as NeMo does for "{input} {output}"."""
        texts = []
        for item in rendered:
            start = item.spans[0][0]
            blank = self._blank_is_extra and item.text[start : start + 1] == " "
            texts += [item.text[:start], item.text[start + blank :]]
        ids = [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]
        return [
            (
                np.array(prompt + answer, dtype=np.int32),
                np.repeat([False, True], [len(prompt), len(answer)]),
            )
            for prompt, answer in zip(ids[::2], ids[1::2], strict=True)
        ]

    def _marked(self, encoding: Any, item: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Mark the tokens of the spans; tokenize in parts where a token spans prompt and answer."""
        supervised = np.zeros(len(encoding.ids), dtype=bool)
        cuts = []
        for start, end in item.spans:
            first, clean = _first_token(encoding, item.text, start)
            last, _ = _first_token(encoding, item.text, end)
            supervised[first:last] = True
            if not clean:
                cuts.append(start)
        if not cuts:
            return np.array(encoding.ids, dtype=np.int32), supervised
        return self._in_parts(item, cuts)

    def _in_parts(self, item: Rendered, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize the text cut at `cuts`, as inference tokenizes the prompt without the answer."""
        tokens, supervised = [], []
        bounds = [0, *cuts, len(item.text)]
        for begin, stop in zip(bounds, bounds[1:], strict=False):
            # a tokenizer that puts a blank before any text would put one into the middle of this
            # one; behind a line feed it does not
            guard = "\n" if begin > 0 and self._adds_blank else ""
            part = guard + item.text[begin:stop]
            encoding = self._encode([part], add_special_tokens=False)[0]
            skipped, _ = _first_token(encoding, part, len(guard))
            marks = np.zeros(len(encoding.ids), dtype=bool)
            for start, end in item.spans:
                if start < stop and end > begin:
                    first, _ = _first_token(encoding, part, max(start - begin, 0) + len(guard))
                    last, _ = _first_token(encoding, part, min(end, stop) - begin + len(guard))
                    marks[first:last] = True
            tokens.append(np.array(encoding.ids[skipped:], dtype=np.int32))
            supervised.append(marks[skipped:])
        return np.concatenate(tokens), np.concatenate(supervised)


def _first_token(encoding: Any, text: str, position: int) -> tuple[int, bool]:
    """Find the first token that starts at or after a character.

    Args:
        encoding: a `tokenizers.Encoding` of the text.
        text: the text.
        position: the character, 0..len(text).

    Returns:
        Its index (the number of tokens, if there is none), and whether the text splits cleanly
        there: no token holds characters from both sides.
    """
    if position <= 0:
        return 0, True
    token = None
    at = position
    # some tokenizers drop blanks, or leave them out of a token's characters
    while at < len(text) and (token := encoding.char_to_token(at)) is None:
        at += 1
    before = encoding.char_to_token(position - 1)
    if token is None:
        return len(encoding.ids), before is not None
    if before is not None and token == before:
        # several byte tokens may share one character: the next clean one comes after all of them
        while token < len(encoding.ids) and encoding.token_to_chars(token)[0] < position:
            token += 1
        return token, False
    # a character before that belongs to no token may be a blank that the next token took in
    return token, before is not None


def bos_of(tokenizer: Any, add_bos: bool | None) -> int | None:
    """Return the BOS id that raw text begins with, or None for no BOS.

    Args:
        tokenizer: a transformers tokenizer.
        add_bos: None: as the tokenizer does.

    Returns:
        The id or None.

    Raises:
        UserError: BOS is asked for, and the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if add_bos is None:
        return bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None
    if add_bos and bos is None:
        raise UserError(
            f"data.add_bos=true, but the tokenizer of {tokenizer.name_or_path} has no BOS token",
            hint="data.add_bos=null",
        )
    return bos if add_bos else None
