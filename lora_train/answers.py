"""Answers generated for held-out examples, compared with their references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_train.data.held_out import HeldOutExample
from lora_train.evaluation.scores import is_exact_match
from lora_train.generation import generate_answers


@dataclass(frozen=True)
class AnswerReport:
    """Generated answers and their score."""

    answers: list[str]
    exact_match: float
    """Share of answers equal to the reference, 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"exact_match": self.exact_match, "answers": self.answers}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> AnswerReport:
        """The inverse of `to_dict`."""
        return cls(answers=tree["answers"], exact_match=tree["exact_match"])


def answer_held_out(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[HeldOutExample],
    *,
    max_new_tokens: int,
    batch_size: int,
    should_stop: Callable[[], bool],
    console: Console,
) -> AnswerReport | None:
    """Answer the examples greedily and score them.

    Args:
        model: the model, with or without its adapter.
        tokenizer: the model's tokenizer.
        examples: at least one.
        max_new_tokens: longest answer, in tokens.
        batch_size: examples generated at once.
        should_stop: asked between two batches, whether to give up.
        console: shows how far it is, on a terminal.

    Returns:
        The answers in the order of the examples; None after a stop.
    """
    answers: list[str] = []
    with console.status("") as status:
        for start in range(0, len(examples), batch_size):
            if should_stop():
                return None
            status.update(f"answered {start} of {len(examples)} held-out examples")
            answers += generate_answers(
                model,
                tokenizer,
                [example.prompt_ids for example in examples[start : start + batch_size]],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
    equal = [
        is_exact_match(answer, example.reference)
        for answer, example in zip(answers, examples, strict=True)
    ]
    return AnswerReport(answers=answers, exact_match=sum(equal) / len(equal))
