"""Losses and answers of a loaded model, batch by batch, into the journal."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.data.batches import collate
from lora_train.data.packing import Packs
from lora_train.errors import RunError
from lora_train.evaluation.journal import Journal
from lora_train.evaluation.progress import Countdown
from lora_train.evaluation.rows import EvaluationRows
from lora_train.evaluation.subject import LoadedSubject
from lora_train.generation import Answer, answer_prompts
from lora_train.loss import token_losses

logger = logging.getLogger(__name__)


def measure_losses(
    loaded: LoadedSubject,
    variant: str,
    rows: EvaluationRows,
    config: Config,
    journal: Journal,
    console: Console,
) -> None:
    """Measure the loss of every sequence, in the packs and micro-batches of a validation.

    Args:
        loaded: the model.
        variant: what it answers as.
        rows: the sequences and their packs.
        config: the run; `data.micro_batch_size` is read.
        journal: gets the losses; what it has already is not measured again.
        console: shows how far it is.

    Raises:
        RunError: a loss is not finite, or the GPU has no room for a single pack.
    """
    size = micro_batch_size(config)
    packs = rows.packs
    batches = [
        list(range(start, min(start + size, len(packs)))) for start in range(0, len(packs), size)
    ]
    waiting = [
        batch
        for batch in batches
        if any((variant, int(one)) not in journal.losses for pack in batch for one in packs[pack])
    ]
    if not waiting:
        return
    done = len(batches) - len(waiting)
    with (
        Countdown(console, f"loss ({variant}), batches", total=len(batches), done=done) as progress,
        loaded.as_variant(variant),
    ):
        for batch in waiting:
            journal.add_losses(variant, _losses(loaded, rows, packs, batch))
            progress.advance(1)


def _losses(
    loaded: LoadedSubject, rows: EvaluationRows, packs: Packs, pack_ids: list[int]
) -> list[tuple[int, float, int]]:
    try:
        return _losses_at_once(loaded, rows, packs, pack_ids)
    except torch.OutOfMemoryError as error:
        if len(pack_ids) == 1:
            raise RunError(
                f"out of GPU memory with a single pack: {error}",
                hint="--seq-length N with a smaller N, which leaves longer rows out, or a GPU with "
                "more memory",
            ) from error
    torch.cuda.empty_cache()
    half = len(pack_ids) // 2
    return [
        *_losses(loaded, rows, packs, pack_ids[:half]),
        *_losses(loaded, rows, packs, pack_ids[half:]),
    ]


def _losses_at_once(
    loaded: LoadedSubject, rows: EvaluationRows, packs: Packs, pack_ids: list[int]
) -> list[tuple[int, float, int]]:
    batch = collate(rows.sequences, packs, pack_ids)
    members = [int(one) for pack in pack_ids for one in packs[pack]]
    # a token is predicted from its own sequence: the first of each counts nowhere
    owners = np.searchsorted(batch.cu_seqlens.numpy(), batch.predicting.numpy(), side="right") - 1
    losses = token_losses(loaded.model, batch.to(loaded.device)).double().cpu().numpy()
    nats = np.bincount(owners, weights=losses, minlength=len(members))
    counts = np.bincount(owners, minlength=len(members))
    if not np.isfinite(nats).all():
        bad = members[int(np.flatnonzero(~np.isfinite(nats))[0])]
        place = next(row.place for row in rows.rows if bad in row.sequences)
        raise RunError(
            f"{place}: the loss is not finite",
            hint="the weights hold NaN or overflow: another --checkpoint, or trainer.precision",
        )
    return list(zip(members, nats.tolist(), counts.tolist(), strict=True))


def answer_rows(
    loaded: LoadedSubject,
    variants: Sequence[str],
    rows: EvaluationRows,
    journal: Journal,
    console: Console,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Answer every row that has a prompt, greedily, as each variant.

    Args:
        loaded: the model.
        variants: what it answers as.
        rows: the rows.
        journal: gets the answers; what it has already is not asked again.
        console: shows how far it is.
        max_new_tokens: longest answer, in tokens.
        batch_size: most prompts at once; halved where the GPU has no room for so many.

    Raises:
        RunError: the GPU has no room for a single prompt.
    """
    asked = [index for index, row in enumerate(rows.rows) if row.prompt_ids is not None]
    # the longest first: memory that does not suffice shows at once. The batches are the same
    # whatever was answered before, and so are the bits of the answers
    asked.sort(key=lambda index: -len(rows.rows[index].prompt_ids or ()))
    batches = [
        (variant, asked[start : start + batch_size])
        for start in range(0, len(asked), batch_size)
        for variant in variants
    ]
    waiting = [
        (variant, batch)
        for variant, batch in batches
        if any((variant, index) not in journal.answers for index in batch)
    ]
    if not waiting:
        return
    total = len(asked) * len(variants)
    done = total - sum(len(batch) for _, batch in waiting)
    with Countdown(console, "answers", total=total, done=done) as progress:
        for variant, batch in waiting:
            prompts = [rows.rows[index].prompt_ids or [] for index in batch]
            with loaded.as_variant(variant):
                answers, batch_size = _answers(loaded, prompts, max_new_tokens, batch_size)
            journal.add_answers(
                variant,
                [
                    (index, answer.text, answer.is_complete)
                    for index, answer in zip(batch, answers, strict=True)
                ],
            )
            progress.advance(len(batch))


def _answers(
    loaded: LoadedSubject, prompts: list[list[int]], max_new_tokens: int, batch_size: int
) -> tuple[list[Answer], int]:
    """Answer prompts, and return with the answers how many at once the GPU has room for."""
    while True:
        try:
            answers = answer_prompts(
                loaded.model, loaded.tokenizer, prompts,
                max_new_tokens=max_new_tokens, batch_size=batch_size,
            )  # fmt: skip
            return answers, batch_size
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise RunError(
                    f"out of GPU memory with a single prompt: {error}",
                    hint="--max-new-tokens N with a smaller N, --seq-length N, or a GPU with more "
                    "memory",
                ) from error
        batch_size = max(1, min(batch_size, len(prompts)) // 2)
        torch.cuda.empty_cache()
        logger.warning("out of GPU memory: answers in batches of %d now", batch_size)
