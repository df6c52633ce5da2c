"""The words of `lora-train eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

_DESCRIPTION = """\
Measure what a run has learned. RUN is a run directory that `lora-train` made. Rows are rendered,
labelled and packed as the run does it, so the loss is the one that its validation shows; answers
are generated greedily and compared with what stands in the rows.

  lora-train eval runs/quickstart
      on the rows that the run itself validates on
  lora-train eval runs/mine --data test.jsonl --which both
      base and adapter side by side; the difference with its 95 % interval and McNemar's test
  lora-train eval runs/squad --data squad --limit 500
      NeMo's test rows with several right answers; the first 500
  lora-train eval runs/mine --data test.jsonl --model merged/mine
      the merged model in place of base and adapter, on the same rows
  lora-train eval runs/mine --tasks hellaswag,arc_easy --which both
      lm-evaluation-harness, if it is installed

Rows may have any form that training takes, NeMo's `original_answers` (a list), or SQuAD's own
columns (context, question, answers). Figures: loss in nats per supervised token, perplexity, exact
match, exact match and F1 by SQuAD's rules (the best over the right answers); where all of these
are JSON objects or lists: exact match by value, valid JSON, F1 of the fields.

The run directory gets eval_NAME.json (the figures) and eval_NAME.jsonl (every row). What is
measured so far collects in FILE.jsonl.part: after SIGTERM, Ctrl-C or a kill the same command goes
on with it. Rows that are in the training data are counted, and marked in the file.
"""


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the words of a command line; exits with status 2 where they contradict each other.

    Args:
        argv: the words after `lora-train eval`.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="lora-train eval",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run directory")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--data", metavar="FILE|FOLDER|HUB",
        help="rows to evaluate on (default: those that the run validates on)",
    )  # fmt: skip
    rows.add_argument(
        "--subset", metavar="NAME", help="configuration of a hub dataset that has several"
    )
    rows.add_argument(
        "--split", metavar="NAME", help="of --data, or of the run's data (default: test, else "
        "validation)",
    )  # fmt: skip
    rows.add_argument(
        "--limit", type=_positive_int, metavar="N", help="the first N rows (default: all)"
    )
    rows.add_argument(
        "--seq-length", type=_positive_int, metavar="N",
        help="longest row, in tokens (default: the run's data.seq_length)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--which", choices=["adapter", "base", "both"], help="what is measured (default: adapter)"
    )
    model.add_argument(
        "--checkpoint", type=_positive_int, metavar="STEP",
        help="the adapter of this step (default: the finished one, else the newest)",
    )  # fmt: skip
    model.add_argument(
        "--model", "--merged", metavar="PATH",
        help="another model instead, such as a merged one: a folder or hub name; RUN may be left "
        "out",
    )  # fmt: skip
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--max-new-tokens", type=_positive_int, metavar="N",
        help="longest answer, in tokens (default: the run's eval.max_new_tokens)",
    )  # fmt: skip
    answers.add_argument(
        "--batch-size", type=_positive_int, metavar="N",
        help="prompts at once (default: the run's eval.batch_size); halved where the GPU has no "
        "room",
    )  # fmt: skip
    answers.add_argument(
        "--loss-only", action="store_true", help="generate no answers: loss and perplexity alone"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FILE.jsonl",
        help="a line for each row (default: eval_NAME.jsonl in the run directory)",
    )  # fmt: skip
    output.add_argument(
        "--json", action="store_true", help="the figures as JSON on stdout, for scripts"
    )
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument(
        "--tasks", type=_names, metavar="NAME,...",
        help="its tasks, instead of rows; with --limit and --batch-size",
    )  # fmt: skip
    tasks.add_argument(
        "--num-fewshot", type=_count, metavar="N",
        help="examples before each question (default: the task's own)",
    )  # fmt: skip
    tasks.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with task files of your own"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="put questions as chats")
    options = parser.parse_args(argv)
    mistake = _mistake(options)
    if mistake is not None:
        parser.error(mistake)
    return options


def _mistake(options: argparse.Namespace) -> str | None:
    """Return what contradicts itself in a command line."""
    if options.run is None and options.model is None:
        return "give a run directory (or --model PATH with --data)"
    if options.run is None and options.data is None and options.tasks is None:
        return "without a run directory, --data FILE names the rows"
    if options.subset is not None and options.data is None:
        return "--subset is of a hub dataset: name it with --data"
    if options.model and options.which is not None:
        return "--which is for the run's adapter and base: leave it out"
    if options.model and options.checkpoint is not None:
        return "--checkpoint is for the run's adapter: leave it out"
    if options.which == "base" and options.checkpoint is not None:
        return "--checkpoint is for the adapter, and --which base leaves it out"
    if options.output is not None and options.output.suffix != ".jsonl":
        return f"--output {options.output}: a line for each row is written; name it FILE.jsonl"
    of_tasks = {
        "--num-fewshot": options.num_fewshot is not None,
        "--include-path": options.include_path is not None,
        "--apply-chat-template": options.apply_chat_template,
    }
    of_rows = {
        "--data": options.data is not None,
        "--split": options.split is not None,
        "--seq-length": options.seq_length is not None,
        "--max-new-tokens": options.max_new_tokens is not None,
        "--loss-only": options.loss_only,
        "--output": options.output is not None,
    }
    wrong = [name for name, given in (of_rows if options.tasks else of_tasks).items() if given]
    if wrong and options.tasks:
        return f"{', '.join(wrong)}: not with --tasks, which bring their own questions"
    return f"{', '.join(wrong)}: only with --tasks" if wrong else None


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one")
    return names


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)
