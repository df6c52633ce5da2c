"""`lora-train eval`: loss, exact match and F1 of a run, its base, or another model, on any rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time

from rich.console import Console

from lora_train import __version__, exit_status
from lora_train.commands.evaluate_options import parse_options
from lora_train.config import Config, DataConfig, KernelsConfig
from lora_train.evaluation.files import ResultFiles, name_of, result_files, write_whole
from lora_train.evaluation.subject import Subject, find_subject
from lora_train.recorded_run import RecordedRun, read_run

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train eval`.

    Returns:
        The exit status.

    Raises:
        UserError: an argument names nothing that can be used, or a row is bad.
        RunError: the evaluation failed; what was measured before is kept.
    """
    options = parse_options(argv)
    run = None if options.run is None else read_run(options.run)
    subject = find_subject(
        run,
        which=options.which or "adapter",
        checkpoint=options.checkpoint,
        model=options.model,
    )
    if subject.step is not None and options.checkpoint is None:
        print(f"the run is not finished: adapter of step {subject.step}", file=sys.stderr)
    config = _config(run, subject, options)
    name = _name(options, subject)
    files = result_files(run, name, options.output)
    if options.tasks is not None:
        return _run_tasks(options, subject, config, files, name)
    return _evaluate(options, subject, config, run, files, name)


def _name(options: argparse.Namespace, subject: Subject) -> str:
    """Return what tells an evaluation of a run from its others.

    Such as `validation`, `test_both_first100`, `squad_test_step50`.
    """
    if options.tasks is not None:
        parts = ["-".join(["tasks", *options.tasks])]
        if options.num_fewshot is not None:
            parts.append(f"{options.num_fewshot}shot")
        if options.apply_chat_template:
            parts.append("chat")
    else:
        data = options.data and name_of(options.data)
        parts = [part for part in (data, options.subset, options.split) if part] or ["validation"]
    if options.model is not None:
        parts.append(name_of(options.model))
    elif subject.variants != ("adapter",):
        parts.append("both" if len(subject.variants) == 2 else subject.variants[0])
    if subject.step is not None:
        parts.append(f"step{subject.step}")
    if options.limit is not None:
        parts.append(f"first{options.limit}")
    if options.loss_only:
        parts.append("loss")
    return "_".join(parts)


def _config(run: RecordedRun | None, subject: Subject, options: argparse.Namespace) -> Config:
    if run is None:
        config = Config(model=subject.model, data=DataConfig(path=options.data or "no data"))
    else:
        config = run.config
    if options.seq_length is None:
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, seq_length=options.seq_length)
    )


def _evaluate(
    options: argparse.Namespace,
    subject: Subject,
    config: Config,
    run: RecordedRun | None,
    files: ResultFiles,
    name: str,
) -> int:
    # the rows before torch is imported: a mistake in them shows at once
    from lora_train.evaluation.rows import read_questions

    questions = read_questions(
        config,
        data=options.data,
        subset=options.subset,
        split=options.split,
        limit=options.limit,
        with_answers=not options.loss_only,
    )
    console = Console(stderr=True)
    from lora_train.evaluation.session import Request, evaluate
    from lora_train.evaluation.table import print_result
    from lora_train.logs import start_log

    start_log(console, quiet=False)
    if not questions.are_answered and not options.loss_only:
        logger.warning("plain text has no prompts to answer: the loss alone is measured")
    request = Request(
        name=name,
        subject=subject,
        config=config,
        questions=questions,
        has_run=run is not None,
        files=files,
        max_new_tokens=options.max_new_tokens or config.eval.max_new_tokens,
        batch_size=options.batch_size or config.eval.batch_size,
    )
    summary = evaluate(request, console)
    if summary is None:
        return exit_status.STOPPED
    if options.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        print_result(Console(), summary)
    return exit_status.OK


def _run_tasks(
    options: argparse.Namespace, subject: Subject, config: Config, files: ResultFiles, name: str
) -> int:
    from lora_train.evaluation.harness import check_installed, find_tasks, print_tasks, run_tasks

    check_installed(options.tasks)
    manager = find_tasks(options.tasks, options.include_path)
    from lora_train.device import set_cpu_threads
    from lora_train.evaluation.subject import load_subject
    from lora_train.logs import start_log
    from lora_train.model import load_tokenizer

    start_log(Console(stderr=True), quiet=False)
    set_cpu_threads()
    # padded batches and whole logits are what the harness asks for: nothing for the fused kernels
    off = dataclasses.replace(config, kernels=KernelsConfig(fused="off"))
    loaded = load_subject(subject, off, load_tokenizer(subject.model))
    summary = {
        "name": name,
        **subject.describe(),
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "precision": str(loaded.dtype).removeprefix("torch."),
        "tasks": run_tasks(
            loaded,
            subject.variants,
            options.tasks,
            manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            apply_chat_template=options.apply_chat_template,
        ),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "lora_train": __version__,
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    # printed first: that costs hours, and the disk may be full
    if options.json:
        print(text)
    else:
        print_tasks(Console(), summary)
    write_whole(files.summary, text + "\n")
    return exit_status.OK
