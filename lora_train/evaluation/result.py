"""The figures of an evaluation: one record a row, and the means with how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lora_train.evaluation.intervals import mcnemar, mean_interval, share_interval
from lora_train.evaluation.journal import Journal
from lora_train.evaluation.rows import EvaluationRows
from lora_train.evaluation.scores import score

SHARES = ("exact_match", "squad_exact", "f1", "json_valid", "field_f1")
"""Figures that are means over answers, 0 to 1."""
_RIGHT_OR_WRONG = ("exact_match", "squad_exact", "json_valid")
_NUM_WORST = 3


def make_records(
    rows: EvaluationRows,
    variants: Sequence[str],
    journal: Journal,
    in_training: Sequence[bool] | None,
) -> list[dict[str, Any]]:
    """Return what is known of each row.

    Args:
        rows: the rows.
        variants: what was measured.
        journal: holds all losses and answers.
        in_training: for each row whether a training row has its prompt; None: not known.

    Returns:
        For each row, in order: `place`, `prompt`, `references`, `in_training`, and under the name
        of each variant `loss` (nats per token; null where the row was too long), `tokens` it is
        the mean of, `answer` (null where none was asked for), `is_complete` (false: cut at the
        longest allowed), and its scores, see `scores.Scores`.
    """
    records = []
    for index, row in enumerate(rows.rows):
        record: dict[str, Any] = {
            "place": row.place,
            "prompt": row.prompt,
            "references": list(row.references),
            "in_training": None if in_training is None else in_training[index],
        }
        for variant in variants:
            losses = [journal.losses[variant, sequence] for sequence in row.sequences]
            nats, tokens = sum(one[0] for one in losses), sum(one[1] for one in losses)
            answer, is_complete = journal.answers.get((variant, index), (None, None))
            record[variant] = {
                "loss": nats / tokens if tokens else None,
                "tokens": tokens,
                "answer": answer,
                "is_complete": is_complete,
                **({} if answer is None else asdict(score(answer, row.references))),
            }
        records.append(record)
    return records


def flat_record(record: dict[str, Any], variants: Sequence[str]) -> dict[str, Any]:
    """Return a record as a line of the results: a single variant's values stand in it directly."""
    if len(variants) > 1:
        return record
    [variant] = variants
    rest = {key: value for key, value in record.items() if key != variant}
    return {**rest, **record[variant]}


def figures(records: Sequence[dict[str, Any]], variant: str) -> dict[str, Any]:
    """Compute the means of one variant.

    Args:
        records: what `make_records` returned, or some of them.
        variant: adapter, base or model.

    Returns:
        `num_measured` rows with `num_tokens` supervised tokens, `loss` in nats per token over all
        of these tokens, `perplexity`; `num_answered` rows, `num_cut` answers that were cut at
        the longest allowed, and the means that `SHARES` names, where they apply to all answers;
        `intervals`: the 95 % interval of each of these by name, [low, high] or null.
    """
    rows = [record[variant] for record in records]
    result: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    sums, weights = _losses(rows)
    result["num_measured"], result["num_tokens"] = len(sums), int(weights.sum())
    if len(sums):
        loss = float(sums.sum() / weights.sum())
        result |= {"loss": loss, "perplexity": _perplexity(loss)}
        interval = mean_interval(sums, weights)
        intervals["loss"] = _listed(interval)
        intervals["perplexity"] = interval and [_perplexity(end) for end in interval]
    answered = [row for row in rows if row["answer"] is not None]
    result["num_answered"] = len(answered)
    result["num_cut"] = sum(not row["is_complete"] for row in answered)
    for name in SHARES:
        values = _values(answered, name)
        if values is not None:
            result[name] = float(values.mean())
            intervals[name] = _listed(
                share_interval(values)
                if name in _RIGHT_OR_WRONG
                else mean_interval(values, np.ones_like(values))
            )
    return {**result, "intervals": intervals}


def difference(records: Sequence[dict[str, Any]], variants: Sequence[str]) -> dict[str, Any]:
    """Compare the first variant with the second on the same rows.

    Args:
        records: what `make_records` returned.
        variants: two of them; the second is subtracted.

    Returns:
        The difference of each figure, `intervals` as `figures` has them, and `mcnemar` of the exact
        match: rows that the first alone has right (`gained`), that the second alone has
        (`lost`), and the `p_value` of its exact test.
    """
    first, second = ([record[variant] for record in records] for variant in variants)
    result: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    (sums, weights), (other_sums, _) = _losses(first), _losses(second)
    if len(sums):
        result["loss"] = float((sums - other_sums).sum() / weights.sum())
        intervals["loss"] = _listed(mean_interval(sums - other_sums, weights))
    answered, other_answered = (
        [row for row in rows if row["answer"] is not None] for rows in (first, second)
    )
    for name in SHARES:
        values, others = _values(answered, name), _values(other_answered, name)
        if values is None or others is None:
            continue
        result[name] = float((values - others).mean())
        intervals[name] = _listed(mean_interval(values - others, np.ones_like(values)))
        if name == "exact_match":
            gained, lost = int((values > others).sum()), int((values < others).sum())
            p_value = mcnemar(gained, lost)
            result["mcnemar"] = {"gained": gained, "lost": lost, "p_value": p_value}
    return {**result, "intervals": intervals}


def compare(records: Sequence[dict[str, Any]], variants: Sequence[str]) -> dict[str, Any]:
    """Compute everything that is computed of records.

    Args:
        records: what `make_records` returned.
        variants: what was measured.

    Returns:
        `results` by variant; `difference` of two; `num_in_training` (null: not known) and, where
        some rows are, but not all, `without_training_rows` with the `results` of the others;
        `worst`: the records of a few answers that are furthest off.
    """
    known = [record["in_training"] for record in records]
    num_in_training = None if None in known else sum(known)
    others = [record for record in records if record["in_training"] is False]
    result: dict[str, Any] = {
        "results": {variant: figures(records, variant) for variant in variants},
        "difference": difference(records, variants) if len(variants) == 2 else None,
        "num_in_training": num_in_training,
        "without_training_rows": None,
        "worst": worst(records, variants[0]),
    }
    if num_in_training and others:
        result["without_training_rows"] = {
            variant: figures(others, variant) for variant in variants
        }
    return result


def worst(records: Sequence[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """Return a few records with the answers that are furthest off, the worst first."""

    def how_good(record: dict[str, Any]) -> tuple[float, float]:
        row = record[variant]
        likeness = row["f1"] if row["field_f1"] is None else row["field_f1"]
        return likeness, -(row["loss"] or 0.0)

    wrong = [
        record
        for record in records
        if record[variant]["answer"] is not None and not record[variant]["exact_match"]
    ]
    return sorted(wrong, key=how_good)[:_NUM_WORST]


def _losses(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Sums in nats and tokens of the rows that have a loss, both (rows,) float64."""
    measured = [row for row in rows if row["tokens"]]
    weights = np.array([row["tokens"] for row in measured], dtype=np.float64)
    return np.array([row["loss"] for row in measured], dtype=np.float64) * weights, weights


def _values(answered: Sequence[dict[str, Any]], name: str) -> np.ndarray | None:
    """A score of each answer, (answers,) float64; None without answers, or where one has none."""
    values = [row[name] for row in answered]
    if not values or None in values:
        return None
    return np.array(values, dtype=np.float64)


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
