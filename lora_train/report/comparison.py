"""What tells several runs apart: their names, their settings, and what they were made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_train.config_loading import flatten, to_tree
from lora_train.report import formats
from lora_train.report.findings import Findings
from lora_train.report.records import variables_of

# say where a run lies, not what it was
_NO_SETTINGS = ("log.log_dir", "log.name")


def run_labels(runs: list[Findings]) -> list[str]:
    """Return what tells the runs apart: their names, or their paths where names are the same."""
    names = [run.name for run in runs]
    is_clear = len(set(names)) == len(names)
    return names if is_clear else [str(run.record.run.path) for run in runs]


def different_settings(runs: list[Findings]) -> list[dict[str, Any]]:
    """Compare the configurations and surroundings of several runs.

    Args:
        runs: at least two.

    Returns:
        label and texts (one for each run) of each key that is not the same everywhere.
    """
    columns = [dict(_settings(run)) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [
        {"label": key, "texts": [column.get(key, formats.UNKNOWN) for column in columns]}
        for key in keys
    ]
    return [row for row in rows if len(set(row["texts"])) > 1]


def _settings(run: Findings) -> Iterator[tuple[str, str]]:
    for key, value in flatten(to_tree(run.record.run.config)):
        if key not in _NO_SETTINGS:
            yield key, "null" if value is None else str(value)
    if run.record.num_gpus is not None:
        yield "GPUs", str(run.record.num_gpus)
    yield from made_with(run, is_short=True)


def made_with(run: Findings, *, is_short: bool) -> Iterator[tuple[str, str]]:
    """Yield machine and packages of a run, by what readers call them.

    Args:
        run: one run.
        is_short: leave out when and where it was, and the job's variables.

    Yields:
        Name and text.
    """
    environment = run.record.environment
    for key in ("device", "lora_train", "python") + (() if is_short else ("started", "host")):
        if environment.get(key):
            yield key.replace("_", "-"), str(environment[key])
    packages = environment.get("packages")
    if isinstance(packages, dict):
        yield from ((name, str(version)) for name, version in packages.items() if version)
    if not is_short:
        yield from variables_of(environment).items()
