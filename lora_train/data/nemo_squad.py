"""SQuAD as NeMo's SquadDataModule has it: the same files, byte for byte, at the same place."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# where NeMo's `squad` comes from
SQUAD_ON_HUB = "rajpurkar/squad"
_VALIDATION_PROPORTION = 0.05


def nemo_squad_folder() -> Path:
    """Return the folder where NeMo keeps SQuAD; it need not exist.

    Returns:
        `$NEMO_DATASETS_CACHE/squad`; NEMO_DATASETS_CACHE is `$NEMO_HOME/datasets` when not set, and
        NEMO_HOME `~/.cache/nemo`.
    """
    home = Path(os.environ.get("NEMO_HOME") or Path.home() / ".cache" / "nemo")
    return Path(os.environ.get("NEMO_DATASETS_CACHE") or home / "datasets") / "squad"


def prepared_squad(load: Callable[[], Mapping[str, Any]], seed: int) -> Path:
    """Return the folder with NeMo's three files, and make them first if training.jsonl is missing.

    Args:
        load: loads SQuAD in its original columns; called only when the files must be made.
        seed: seed of the split. As in NeMo, files that are there are used whatever their seed was.

    Returns:
        The folder with training.jsonl, validation.jsonl and test.jsonl.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = nemo_squad_folder()
    if not (folder / "training.jsonl").exists():
        write_squad(load(), folder, seed)
    return folder


def write_squad(squad: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write SQuAD as NeMo does: 5 % of train become validation, the validation split becomes test.

    Args:
        squad: the splits `train` and `validation`, as `datasets.Dataset` in SQuAD's own columns.
        folder: where to write; made if needed.
        seed: seed of the split.

    Raises:
        OSError: the folder cannot be written.
    """
    halves = squad["train"].train_test_split(test_size=_VALIDATION_PROPORTION, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    # training.jsonl is last: NeMo, and we, take its presence for the presence of all three
    for name, rows in (
        ("test", squad["validation"]),
        ("validation", halves["test"]),
        ("training", halves["train"]),
    ):
        # a name per process, then one rename: two jobs at once, or a kill, leave whole files
        unfinished = folder / f".{name}.jsonl.tmp-{os.uname().nodename}-{os.getpid()}"
        try:
            with unfinished.open("w", encoding="utf-8") as stream:
                for row in rows:
                    stream.write(json.dumps(nemo_row(row, is_test=name == "test")) + "\n")
            unfinished.replace(folder / f"{name}.jsonl")
        finally:
            unfinished.unlink(missing_ok=True)
    logger.info("wrote SQuAD in NeMo's form to %s", folder)


def nemo_row(row: Mapping[str, Any], *, is_test: bool) -> dict[str, Any]:
    """Return a row of SQuAD as NeMo writes it; a test row with all of its answers."""
    answers = row["answers"]["text"]
    line = {
        "input": f"Context: {row['context']} Question: {row['question']} Answer:",
        "output": answers[0],
    }
    return {**line, "original_answers": answers} if is_test else line
