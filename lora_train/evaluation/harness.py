"""The door to lm-evaluation-harness: its tasks, with the model of a run.

The package is no dependency. Its tasks read their data through the `datasets` library by hub name,
so on a node without network they must be in its cache.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_train.errors import UserError

logger = logging.getLogger(__name__)

# padded to the longest, a CPU has no use for more
_CPU_BATCH_SIZE = 8
_REQUIREMENT = "lm_eval>=0.4.13"


def check_installed(names: Sequence[str]) -> None:
    """Refuse where lm-evaluation-harness is missing.

    Args:
        names: tasks that it is wanted for.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, which is not installed",
            hint=f"where there is network: {_how_to_install()}\n"
            f"and once, as the data of a task comes from the hub: {_how_to_fetch(names)}",
        )


def _how_to_install() -> str:
    packages = Path(sysconfig.get_path("purelib"))
    if os.access(packages, os.W_OK) and importlib.util.find_spec("pip") is not None:
        return f"{sys.executable} -m pip install '{_REQUIREMENT}'"
    # an image is read-only and has no pip: an environment beside it that sees the image's packages
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = Path(sys.base_prefix, "bin", version)
    return (
        f"{python} -m venv DIR && echo {packages} > DIR/lib/{version}/site-packages/image.pth && "
        f"DIR/bin/pip install '{_REQUIREMENT}', then DIR/bin/python -m lora_train eval ..."
    )


def _how_to_fetch(names: Sequence[str]) -> str:
    # its dummy model answers at random: no GPU, and no model to load
    return f"HF_HUB_OFFLINE=0 lm_eval --model dummy --limit 1 --tasks {','.join(names)}"


def find_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """Look tasks up by name.

    Args:
        names: tasks, groups or tags, as the harness names them.
        include_path: folder with further task files (.yaml).

    Returns:
        The harness's task manager, which knows them.

    Raises:
        UserError: one is unknown, or the folder does not exist.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise UserError(
            f"--tasks: lm-evaluation-harness has no {', '.join(unknown)}",
            hint=f"did you mean {', '.join(near)}?"
            if near
            else "`lm_eval --tasks list` shows all; --include-path DIR adds a folder of your own",
        )
    return manager


def run_tasks(
    loaded: Any,
    variants: Sequence[str],
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    apply_chat_template: bool,
) -> dict[str, Any]:
    """Evaluate each variant of a model on tasks.

    Args:
        loaded: the model, see `subject.LoadedSubject`; not fused.
        variants: what it answers as.
        names: the tasks.
        manager: what `find_tasks` returned.
        num_fewshot: examples before each question; None: the task's own number.
        limit: the first so many questions of each task; None: all.
        batch_size: questions at once; None: what fits on a GPU, 8 on a CPU.
        apply_chat_template: whether questions are put as chats.

    Returns:
        By variant: `results` as the harness has them (task -> metric -> value), `versions` of the
        tasks, and `n-samples`.

    Raises:
        UserError: the data of a task cannot be found.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from lora_train.generation import generating

    if apply_chat_template and loaded.tokenizer.chat_template is None:
        raise UserError(
            "--apply-chat-template, but the tokenizer has no chat template",
            hint="leave it out: a base model continues a text",
        )
    size = batch_size or ("auto" if loaded.device.type == "cuda" else _CPU_BATCH_SIZE)
    found = {}
    for variant in variants:
        logger.info("lm-evaluation-harness: %s (%s)", ", ".join(names), variant)
        with generating(loaded.model, loaded.tokenizer) as base, loaded.as_variant(variant):
            model = HFLM(pretrained=base, tokenizer=loaded.tokenizer, batch_size=size)
            try:
                result = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(names),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=manager,
                    apply_chat_template=apply_chat_template,
                    log_samples=False,
                )
            except Exception as error:
                raise _task_error(error, names) from error
        kept = {key: result[key] for key in ("results", "versions", "n-samples") if key in result}
        # numpy's numbers are no JSON
        found[variant] = json.loads(json.dumps(kept, default=float))
    return found


def _task_error(error: Exception, names: Sequence[str]) -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    links: list[BaseException] = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(link)
    is_missing = any(
        isinstance(link, ConnectionError | DatasetNotFoundError | FileNotFoundError)
        for link in links
    )
    if not is_missing:
        return error
    return UserError(
        f"the data of {', '.join(names)} cannot be loaded: {str(error).splitlines()[0]}",
        hint=f"on a node with network, once and with the same HF_HOME: {_how_to_fetch(names)}",
    )


def print_tasks(console: Console, summary: dict[str, Any]) -> None:
    """Print the results of tasks.

    Args:
        console: where to.
        summary: what the run directory gets; `tasks` is what `run_tasks` returned.
    """
    tasks: dict[str, Any] = summary["tasks"]
    variants = list(reversed(tasks))
    head = f"{summary['subject']}\nlm-evaluation-harness, \u00b1 one standard error"
    console.print(Text(head, style="bold"), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in variants:
        table.add_column(name, justify="right")
    if len(variants) == 2:
        table.add_column("difference", justify="right")
    first = tasks[variants[0]]["results"]
    for task, metrics in first.items():
        for metric, value in metrics.items():
            if not isinstance(value, int | float) or "_stderr," in metric or "," not in metric:
                continue
            values = [tasks[name]["results"][task][metric] for name in variants]
            cells = [_with_error(tasks[name]["results"][task], metric) for name in variants]
            if len(variants) == 2:
                cells.append(f"{values[1] - values[0]:+.4f}")
            table.add_row(Text(task), metric.removesuffix(",none"), *cells)
    console.print(table)


def _with_error(metrics: dict[str, Any], metric: str) -> str:
    name, _, filter_name = metric.partition(",")
    error = metrics.get(f"{name}_stderr,{filter_name}")
    is_known = isinstance(error, int | float)
    return f"{metrics[metric]:.4f}" + (f" \u00b1 {error:.4f}" if is_known else "")
