"""`lora-train`: command line -> one validated `Config` -> the run. Imports no torch before that.

A mistake is refused in under a second, on a login node, with exit status 2.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import lora_train
from lora_train import exit_status
from lora_train.config import Config
from lora_train.errors import EndedByAnother, LoraTrainError, UserError

_SWITCH_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0", "auto"}
# word -> module of lora_train.commands, which has a run(argv)
_COMMANDS = {
    "plan": "plan",
    "preflight": "preflight",
    "prefetch": "prefetch",
    "sbatch": "sbatch",
    "report": "report",
    "eval": "evaluate",
    "generate": "generate",
    "merge": "merge",
    "replay": "replay",
    "verify-resume": "verify_resume",
}
_OVERRIDE = re.compile(r"^([\w.\[\]]+)\s*([-+*/|&]?=)(.*)$", re.DOTALL)


@dataclass
class CommandLine:
    """What the words of a command line say, before any of it is checked against the schema."""

    factory: str | None = None
    config_file: Path | None = None
    dry_run: bool = False
    overrides: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def resolve(self) -> Config:
        """The configuration that the words mean, validated; `config_loading.resolve` raises."""
        from lora_train.config_loading import resolve

        return resolve(
            factory=self.factory,
            config_file=self.config_file,
            overrides=self.overrides,
            problems=self.problems,
        )


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Sort the words of a command line; mistakes are collected, not raised.

    Args:
        words: the words after `lora-train`.

    Returns:
        Options, overrides by dotted name, and mistakes.
    """
    from lora_train.config_loading import leaf_types, nearest_key

    parsed = CommandLine()
    leaves: dict[str, list[str]] = {}
    for dotted in leaf_types():
        leaves.setdefault(dotted.rpartition(".")[2], []).append(dotted)

    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            _read_override(word, parsed)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        option = {"f": "factory", "y": "yes"}.get(name, name)
        if option in ("dry-run", "dryrun", "yes"):  # NeMo asks before it runs; this never does
            parsed.dry_run |= option != "yes"
            if has_value:
                parsed.problems.append(f"{word}: takes no value")
            continue
        name = name.replace("-", "_")
        candidates = [name] if name in leaf_types() else leaves.get(name, [])
        if option == "resume":
            candidates = ["resume.mode"]
        known = option in ("factory", "config") or len(candidates) == 1
        if not has_value and known:
            if len(candidates) == 1 and _is_switch(candidates[0]):
                is_told = bool(waiting) and waiting[0].lower() in _SWITCH_WORDS
                value = waiting.pop(0) if is_told else "true"
            elif _is_value(waiting):
                value = waiting.pop(0)
            else:
                parsed.problems.append(f"{word}: needs a value")
                continue
        if option == "factory":
            if parsed.factory is not None:
                parsed.problems.append(_given_twice("--factory", parsed.factory, value))
            parsed.factory = value
        elif option == "config":
            if parsed.config_file is not None:
                parsed.problems.append(_given_twice("--config", parsed.config_file, value))
            parsed.config_file = Path(value)
        elif len(candidates) == 1:
            _set_key(candidates[0], value, parsed)
        else:
            if not has_value and _is_value(waiting):
                waiting.pop(0)  # the unknown option's value is not a second mistake
            reason = (
                f"several keys end so: {', '.join(candidates)}"
                if candidates
                else f"unknown option{nearest_key(name)}"
            )
            parsed.problems.append(f"{word}: {reason}")
    return parsed


def _read_override(word: str, parsed: CommandLine) -> None:
    from lora_train.config_loading import recipe_names

    match = _OVERRIDE.match(word)
    if match is None:
        meant = f"; did you mean `--factory {word}`?" if word in recipe_names() else ""
        parsed.problems.append(f"{word}: expected KEY=VALUE or --option{meant}")
    elif match[2] != "=":
        parsed.problems.append(f"{word}: only `=` sets a key, found `{match[2]}`")
    else:
        _set_key(match[1], match[3], parsed)


def _set_key(dotted: str, value: str, parsed: CommandLine) -> None:
    if dotted in parsed.overrides:
        parsed.problems.append(_given_twice(dotted, parsed.overrides[dotted], value))
    parsed.overrides[dotted] = value


def _given_twice(name: str, first: object, second: object) -> str:
    return f"{name}: given twice ({first}, {second})"


def _is_value(waiting: list[str]) -> bool:
    """Whether the next word is a value: not an option (a negative number is a value)."""
    return bool(waiting) and (
        not waiting[0].startswith("-") or re.match(r"-[\d.]", waiting[0]) is not None
    )


def _is_switch(dotted: str) -> bool:
    from lora_train.config_loading import leaf_types

    annotation = leaf_types()[dotted]
    return annotation is bool or bool in typing.get_args(annotation)


def _prepare_imports() -> None:
    """Set what torch and bitsandbytes look at once, when they are imported."""
    # bitsandbytes reports a CPU kernel that it has a spare for, and does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # How long a waiting OpenMP thread spins before it sleeps. Its own count takes the core of
    # whatever else runs: 5 steps of the quickstart on 2 cores beside one busy process took over
    # 100 s, with this count 28 s; alone 17 s and 16 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # the C++ stack of a lost connection would bury what the process that failed has said
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _stop_on_signals() -> None:
    """Let the signals that stop a run end the program also while there is nothing to save yet."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # SIGINT raises it by itself; the run takes all three over (see stop_signals.py)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def _train(words: Sequence[str]) -> int:
    from lora_train.batch_split import gradient_accumulation_steps
    from lora_train.config_loading import DEFAULT_FACTORY, to_yaml
    from lora_train.metrics import check_trackers
    from lora_train.ranks import find_ranks, planned_ranks

    parsed = parse_command_line(words)
    config = parsed.resolve()
    if parsed.dry_run:
        gradient_accumulation_steps(config, planned_ranks(config).world_size)
        check_trackers(config)
        print(to_yaml(config), end="")
        return exit_status.OK

    from lora_train.preflight.machine import this_machine
    from lora_train.preflight.runner import is_ready

    machine = this_machine(tuple(words), run_follows=True)
    try:
        ranks = find_ranks(config, machine.count_devices)
    except UserError as error:
        _tell_other_nodes(error)
        raise
    gradient_accumulation_steps(config, ranks.world_size)
    check_trackers(config)
    if parsed.factory is None and parsed.config_file is None and ranks.speaks_for_run:
        print(
            f"no --factory given: running the embedded `{DEFAULT_FACTORY}`\n"
            "a large model: lora-train --factory llama31_8b (lora-train --help lists the others)",
            file=sys.stderr,
        )
    ready = is_ready(config, machine, ranks)
    if not ready and ranks.is_alone:
        return exit_status.USAGE
    if ready and ranks.num_to_start:
        from lora_train.launcher import launch

        return launch(ranks, words)

    from lora_train.run import run  # imports torch, only now

    # the processes on other nodes must hear of it
    return run(config, argv=["lora-train", *words], ranks=ranks, is_refused=not ready)


def _tell_other_nodes(error: UserError) -> None:
    """Let the processes on other nodes end as well, which would wait for this one."""
    from lora_train.ranks import place_in_step

    place = place_in_step()
    if place is not None:
        from lora_train.rendezvous import join

        join(place, error)


def main(argv: Sequence[str] | None = None) -> int:
    """Be the console script.

    Args:
        argv: words after the program's name. None: the process's own.

    Returns:
        The exit status, see `exit_status`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_imports()
    _stop_on_signals()
    try:
        if words[:1] and words[0] in _COMMANDS:
            name = _COMMANDS[words[0]]
            command = importlib.import_module(f"lora_train.commands.{name}")
            return int(command.run(words[1:]))
        if words[:1] == ["nemo"]:
            from lora_train.commands import nemo

            return nemo.run(words[1:], _train)
        if words[:1] == ["train"]:
            words = words[1:]
        if {"-h", "--help"} & set(words):
            from lora_train.config_help import help_text

            print(help_text())
            return exit_status.OK
        if "--version" in words:
            print(f"lora-train {lora_train.__version__}")
            return exit_status.OK
        return _train(words)
    except EndedByAnother as error:
        return error.exit_status
    except LoraTrainError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # lora-train --help | head
        sys.stderr.close()
        return exit_status.FAILED
    except KeyboardInterrupt:
        print("stopped; what was saved is whole, and the same command goes on", file=sys.stderr)
        return exit_status.STOPPED
