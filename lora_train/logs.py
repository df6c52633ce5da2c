"""The log of a run: on stderr for whoever watches, and in train.log of the run directory."""

from __future__ import annotations

import logging
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler


def start_log(console: Console, *, quiet: bool) -> MemoryHandler:
    """Send the log to stderr: through the live line on a terminal, as plain lines elsewhere.

    Args:
        console: stderr.
        quiet: log nothing (all processes but the main one).

    Returns:
        A handler that keeps the log until the run directory has a train.log to hand it to.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # transformers' word to PEFT's authors
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=None
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO)
    backlog = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL, flushOnClose=False)
    package = logging.getLogger("lora_train")
    package.propagate = False
    package.handlers[:] = [logging.NullHandler()] if quiet else [handler, backlog]
    package.setLevel(logging.DEBUG)
    return backlog


def keep_log(backlog: MemoryHandler, file: Path) -> None:
    """Write what was logged so far, and all that follows, to a file.

    Args:
        backlog: what `start_log` returned.
        file: appended to.
    """
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    backlog.setTarget(handler)
    backlog.flush()
    package = logging.getLogger("lora_train")
    package.removeHandler(backlog)
    package.addHandler(handler)
