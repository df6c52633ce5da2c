"""`nemo llm finetune ...`: NVIDIA NeMo's command line, in the words of `lora-train`.

Nothing of NeMo runs: what its words say is handed to the trainer, and what has no equivalent here
is refused. (NeMo itself ignores a dashed option that it does not know and trains with defaults.)
"""

from __future__ import annotations

import ast
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_train import exit_status
from lora_train.config_loading import recipe_names
from lora_train.errors import UserError

_HELP = """\
usage: nemo llm finetune --factory llama31_8b [KEY=VALUE ...] [--dryrun] [--name NAME]

This is lora-train, which understands the command line of `nemo llm finetune`; it is not NVIDIA
NeMo. Keys keep their names, such as trainer.max_steps, data.global_batch_size and peft.dim; an
unknown key or option is refused. The adapter is written in PEFT format.

  --factory NAME, -f NAME   {factories}
                            also "NAME(ARGUMENT=VALUE, ...)", of which there are
                            {arguments}
  --dryrun                  print the resolved configuration and stop
  --name NAME, -n NAME      name of the run directory, as log.name=NAME
  --yes, -y, --no-confirm   taken; nothing is ever asked

nemo llm import is not needed: Hugging Face weights are read as they are (model.path=FOLDER).
All keys, and recipes with our own defaults: lora-train --help
"""
_ARGUMENTS = {
    "num_nodes": "trainer.num_nodes",
    "num_gpus_per_node": "trainer.devices",
    "seq_length": "data.seq_length",
    "name": "log.name",
    "dir": "log.log_dir",
    "packed_sequence": "data.packed_sequence",
}
_WORDS = {"true": True, "false": False, "none": None, "null": None}
# NeMo's recipes change these two with packed_sequence=True
_WHEN_PACKED = {"data.seq_length": "4096", "data.global_batch_size": "8"}
_REFUSED = {
    "--yaml": "a configuration file goes with `lora-train --config FILE`",
    "--load": "a configuration file goes with `lora-train --config FILE`",
    "--to-yaml": "`--dryrun > FILE` writes the resolved configuration",
    "--to-json": "`--dryrun > FILE` writes the resolved configuration, as YAML",
    "--to-toml": "`--dryrun > FILE` writes the resolved configuration, as YAML",
    "--detach": "the run is this process; `sbatch` detaches it",
}


@dataclass
class _Command:
    """What the words after `nemo llm finetune` say."""

    factory: str | None = None
    options: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(argv: Sequence[str], train: Callable[[Sequence[str]], int]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train nemo`.
        train: runs the words of a `lora-train` command line and returns the exit status.

    Returns:
        The exit status.

    Raises:
        UserError: the words mean nothing here.
    """
    if {"-h", "--help"} & set(argv) or list(argv) in ([], ["llm"]):
        print(_help_text(), end="")
        return exit_status.OK if {"-h", "--help"} & set(argv) else exit_status.USAGE
    words = translate(argv)
    # one of the run's processes says it
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        recipe = words[1]
        print(
            f"this is lora-train, not NVIDIA NeMo: recipe {recipe}, with the numbers of NeMo's "
            f"{recipe.removesuffix('_nemo')}; the adapter comes in PEFT format\n"
            f"the same: {shlex.join(['lora-train', *words])}",
            file=sys.stderr,
        )
    return train(words)


def translate(argv: Sequence[str]) -> list[str]:
    """Turn the words of a NeMo command line into those of `lora-train`.

    Args:
        argv: the words after `nemo`.

    Returns:
        `--factory`, the recipe, then everything else.

    Raises:
        UserError: another command than `llm finetune`, or any number of words without equivalent.
    """
    _check_command(argv)
    command = _sort(argv[2:])
    recipe, from_arguments = _read_factory(command)
    given = {word.partition("=")[0].strip() for word in command.overrides}
    if command.problems:
        raise UserError(
            "\n  ".join(["`nemo llm finetune`:", *command.problems]),
            hint="`nemo --help` shows what is understood",
        )
    # a key on the command line wins over the recipe's argument
    defaults = [f"{key}={value}" for key, value in from_arguments.items() if key not in given]
    return ["--factory", recipe, *command.options, *defaults, *command.overrides]


def _check_command(argv: Sequence[str]) -> None:
    named = shlex.join(["nemo", *argv[:2]])
    if list(argv[:2]) == ["llm", "finetune"]:
        return
    if list(argv[:2]) == ["llm", "import"]:
        raise UserError(
            "`nemo llm import` is not needed: Hugging Face weights are read as they are",
            hint="nemo llm finetune --factory llama31_8b model.path=FOLDER_OR_HUB_NAME",
        )
    raise UserError(
        f"`{named}` is not here: this is lora-train, which fine-tunes with LoRA, not NVIDIA NeMo",
        hint="nemo llm finetune --factory llama31_8b; `nemo --help` shows more",
    )


def _sort(words: Sequence[str]) -> _Command:
    command = _Command()
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            command.overrides.append(word)
            continue
        option, has_value, value = word.partition("=")
        option = {"-f": "--factory", "-n": "--name", "-y": "--yes"}.get(option, option)
        if option in ("--factory", "--name"):
            if not has_value and (not waiting or waiting[0].startswith("-")):
                command.problems.append(f"{word}: needs a value")
                continue
            value = value if has_value else waiting.pop(0)
            if option == "--name":
                command.overrides.append(f"log.name={value}")
            elif command.factory is not None:
                command.problems.append(f"--factory: given twice ({command.factory}, {value})")
            else:
                command.factory = value
        elif word in ("--dryrun", "--dry-run"):
            command.options = ["--dry-run"]
        elif option in ("--yes", "--no-confirm") and not has_value:
            continue  # nothing is asked
        else:
            meant = _REFUSED.get(option, "unknown option; a key is set as KEY=VALUE")
            command.problems.append(f"{word}: {meant}")
    return command


def _factories() -> dict[str, str]:
    """NeMo's name of a recipe -> ours."""
    ours = [name for name in recipe_names() if name.endswith("_nemo")]
    return {name.removesuffix("_nemo"): name for name in ours}


def _read_factory(command: _Command) -> tuple[str, dict[str, str]]:
    """Find the recipe that --factory means, and the keys that its arguments set.

    Args:
        command: gets the problems with the arguments.

    Returns:
        Our recipe's name; dotted key -> value as typed on a command line.

    Raises:
        UserError: no such recipe.
    """
    known = _factories()
    if command.factory is None:
        raise UserError(
            "--factory is missing", hint=f"nemo llm finetune --factory {' or '.join(known)}"
        )
    name, has_arguments, arguments = command.factory.strip().partition("(")
    name = name.strip()
    if name not in known and name not in known.values():
        # the one for a single GPU first
        nearest = [ours for ours in reversed(recipe_names()) if name and ours.startswith(name)]
        line = (
            ["--factory", nearest[0]]
            if nearest
            else ["--factory", next(iter(known.values())), "model.path=FOLDER_OR_HUB_NAME"]
        )
        raise UserError(
            f"--factory {name}: no such recipe of NeMo's here; there are: "
            + ", ".join(f"{theirs} (here {ours})" for theirs, ours in known.items()),
            hint=shlex.join(["lora-train", *line, *command.overrides]) + "  runs the like of it",
        )
    recipe = known.get(name, name)
    if not has_arguments:
        return recipe, {}
    try:
        call = ast.parse(f"{name}({arguments}", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
        command.problems.append(
            f"--factory {command.factory}: expected NAME(argument=value, ...), text in quotes"
        )
        return recipe, {}
    keys: dict[str, str] = {}
    for keyword in call.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:  # a bare word
            value = ast.unparse(keyword.value)
            value = _WORDS.get(value.lower(), value)
        keys |= _key_of(str(keyword.arg), value, command)
    return recipe, (_WHEN_PACKED | keys if keys.get("data.packed_sequence") == "True" else keys)


def _key_of(argument: str, value: object, command: _Command) -> dict[str, str]:
    """The keys that one argument of a recipe sets; what has no equivalent becomes a problem."""
    if argument in _ARGUMENTS:
        if value is None:  # NeMo's way to say: as the recipe has it
            return {}
        return {_ARGUMENTS[argument]: str(value)}
    if argument == "peft_scheme":
        if value != "lora":
            command.problems.append(
                f"peft_scheme={value}: only lora is here, adapted by the peft. keys "
                "(peft.use_dora=true is DoRA; full fine-tuning is not here)"
            )
    elif argument == "performance_mode":
        if value:
            command.problems.append(
                "performance_mode: adapts fewer layers; say so by peft.target_modules=[linear_qkv]"
            )
    else:
        command.problems.append(
            f"{argument}: unknown argument; there are {', '.join(_ARGUMENTS)}, peft_scheme"
        )
    return {}


def _help_text() -> str:
    return _HELP.format(factories=", ".join(_factories()), arguments=", ".join(_ARGUMENTS))
