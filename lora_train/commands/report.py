"""`lora-train report`: what a run was, or how several compare, as a page and in the terminal."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lora_train import exit_status
from lora_train.errors import UserError
from lora_train.report.findings import find_all, to_json

_DESCRIPTION = """\
Report on a run, from what its directory holds: curves, speed and MFU, where the time went, what the
GPUs did, and what the job asked for and used. Every run writes it when it ends; this writes it
again, also of a run that failed, was killed, or still goes on.

  lora-train report runs/mine
      prints the short version; writes runs/mine/report.html (one file, to open in any browser or to
      send to someone) and runs/mine/plots/*.png
  lora-train report runs/lr1 runs/lr2 --output comparison
      side by side: curves over each other, and the settings that differ; one page,
      comparison/report.html
  lora-train report runs/* --json
      the figures for a program: a list with an object for each run; writes nothing
"""


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train report`.

    Returns:
        The exit status.

    Raises:
        UserError: a folder is no run directory, or the report cannot be written.
    """
    options = _parse(argv)
    paths = list(dict.fromkeys(path.absolute() for path in options.runs))
    given = {path.absolute(): path for path in options.runs}
    runs = [find_all(given[path]) for path in paths]
    if options.json:
        print(json.dumps([to_json(each) for each in runs], indent=1, allow_nan=False))
        return exit_status.OK

    from lora_train.report.terminal import print_report
    from lora_train.report.writing import write_report

    folder = options.output
    if folder is None:
        folder = runs[0].record.run.path if len(runs) == 1 else Path("report")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file", hint="name a folder; it is made if missing")
    # first, or `lora-train report RUN | head` would write none
    try:
        page = write_report(runs, folder)
    except UserError:
        print_report(runs)  # of another user's run, this is what there is
        raise
    print_report(runs)
    print(f"page: {page}  plots: {page.parent / 'plots'}")
    return exit_status.OK


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-train report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for report.html and plots/ (default: the run's own; of several runs ./report)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures, write nothing")
    return parser.parse_args(argv)
