"""One evaluation, from checked rows to figures on disk, in the order of what happens."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lora_train import __version__
from lora_train.config import Config
from lora_train.device import describe_device, select_device, select_precision, set_cpu_threads
from lora_train.evaluation.files import ResultFiles, read_summary, set_aside, write_whole
from lora_train.evaluation.journal import Journal
from lora_train.evaluation.measuring import answer_rows, measure_losses
from lora_train.evaluation.overlap import rows_in_training
from lora_train.evaluation.result import compare, flat_record, make_records
from lora_train.evaluation.rows import EvaluationRows, Questions, render_rows
from lora_train.evaluation.subject import Subject, load_subject
from lora_train.model import load_tokenizer
from lora_train.model_source import max_positions
from lora_train.paths import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be evaluated."""

    name: str
    """The evaluation's name."""
    subject: Subject
    """The model."""
    config: Config
    """How rows are rendered, labelled and packed, and the model computed."""
    questions: Questions
    """The rows."""
    has_run: bool
    """Whether the configuration is a run's, whose training rows are known."""
    files: ResultFiles
    """Where the results go."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    batch_size: int
    """Most prompts answered at once."""


def evaluate(request: Request, console: Console) -> dict[str, Any] | None:
    """Measure, compare and write down; or return what an earlier call has written of the same.

    Args:
        request: what is to be evaluated.
        console: stderr, for the progress.

    Returns:
        The content of eval_NAME.json: `name`; `subject`, `model`, `adapter`, `step`; `rows` in
        words, `num_rows`, `num_too_long`, `num_input_cut`, `limit`; `max_new_tokens` (null: loss
        alone), `precision`, `device`; `rows_file`, `rows_sha256`; `seconds`, `finished`,
        `lora_train`; what `result.compare` returns (`results` by variant, `difference`,
        `num_in_training`, `without_training_rows`, `worst`); and the `fingerprint` of all that it
        depends on.
        None: stopped on request; what was measured is kept.

    Raises:
        UserError: model, rows or files cannot be used.
        RunError: the evaluation failed; what was measured is kept.
    """
    begun = time.monotonic()
    subject, config, files = request.subject, request.config, request.files
    set_cpu_threads()
    device = select_device()
    precision = select_precision(config.trainer.precision, device)
    logger.info("device: %s; %s", describe_device(device), precision.reason)
    logger.info(
        "rows: %s, of the form %s",
        request.questions.describe(), request.questions.examples.format_name,
    )  # fmt: skip
    if request.questions.is_held_out and config.trainer.limit_val_batches is not None:
        logger.info(
            "the run itself validates on some of them only: trainer.limit_val_batches=%d",
            config.trainer.limit_val_batches,
        )
    tokenizer = load_tokenizer(subject.model)
    positions = max_positions(subject.model)
    rows = render_rows(request.questions, config, tokenizer, max_positions=positions)
    _warn_of_positions(rows, request.max_new_tokens, positions)
    is_answered = request.questions.are_answered
    fingerprint = {
        **subject.fingerprint(),
        "rows": rows.fingerprint(),
        "variants": list(subject.variants),
        "max_new_tokens": request.max_new_tokens if is_answered else None,
        "precision": str(precision.dtype).removeprefix("torch."),
    }
    before = read_summary(files.summary) or {}
    is_same = before.get("fingerprint") == fingerprint
    if is_same and files.rows.exists() and before["rows_sha256"] == sha256_of(files.rows):
        logger.info("this was evaluated before; remove %s to do it again", files.summary)
        return {**before, "rows_file": str(files.rows)}

    journal = Journal(files.rows, fingerprint)
    try:
        if journal.losses or journal.answers:
            logger.info("going on with %s: %s are there", journal.path, _counts(journal))
        in_training = None
        if request.has_run:
            in_training = rows_in_training(request.questions.examples.items, config, tokenizer)
        _measure(request, tokenizer, rows, journal, console)
        records = make_records(rows, subject.variants, journal, in_training)
        if before and not is_same:
            set_aside(files)
        lines = [
            json.dumps(flat_record(record, subject.variants), ensure_ascii=False) + "\n"
            for record in records
        ]
        write_whole(files.rows, "".join(lines))
        summary = {
            "name": request.name,
            **subject.describe(),
            "rows": request.questions.describe(),
            "num_rows": len(rows.rows),
            "num_too_long": rows.num_too_long,
            "num_input_cut": rows.num_cut,
            "limit": f"{rows.limit.source}={rows.limit.tokens}",
            "max_new_tokens": fingerprint["max_new_tokens"],
            "precision": fingerprint["precision"],
            "device": describe_device(device),
            "rows_file": str(files.rows),
            "rows_sha256": sha256_of(files.rows),
            "seconds": round(time.monotonic() - begun, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "lora_train": __version__,
            **compare(records, subject.variants),
            "fingerprint": fingerprint,
        }
        write_whole(files.summary, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        journal.finish()
    except KeyboardInterrupt:
        kept = f"{_counts(journal)} are kept in {journal.path}"
        if not journal.losses:
            kept = "nothing was measured yet"
        print(f"stopped; {kept}, and the same command goes on", file=sys.stderr)
        return None
    finally:
        journal.close()
    return summary


def _measure(
    request: Request, tokenizer: Any, rows: EvaluationRows, journal: Journal, console: Console
) -> None:
    subject = request.subject
    loaded = load_subject(subject, request.config, tokenizer)
    for variant in subject.variants:
        measure_losses(loaded, variant, rows, request.config, journal, console)
    answer_rows(
        loaded, subject.variants, rows, journal, console,
        max_new_tokens=request.max_new_tokens, batch_size=request.batch_size,
    )  # fmt: skip


def _counts(journal: Journal) -> str:
    return f"{len(journal.losses)} losses and {len(journal.answers)} answers"


def _warn_of_positions(rows: EvaluationRows, max_new_tokens: int, positions: int | None) -> None:
    """Say where prompt and answer together may leave what the model was made for."""
    if positions is None:
        return
    num_over = sum(
        row.prompt_ids is not None and len(row.prompt_ids) + max_new_tokens > positions
        for row in rows.rows
    )
    if num_over:
        logger.warning(
            "%d prompts and an answer of %d tokens are longer than the model's %d positions: such "
            "an answer may be poor for that alone",
            num_over, max_new_tokens, positions,
        )  # fmt: skip
