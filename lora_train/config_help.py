"""The text of `lora-train --help`, made from the schema's field docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import typing
from typing import Any

from lora_train import config as schema
from lora_train.config import Config
from lora_train.config_loading import leaf_types, recipe_names
from lora_train.exit_status import EXIT_STATUS_HELP

_INTRODUCTION = """\
usage: lora-train [--factory NAME] [--config FILE] [KEY=VALUE ...] [--dry-run]
       lora-train COMMAND ...

commands, each with its own --help:
  plan           will it fit, how fast will it be: memory, tokens/s and GPU-hours, without a GPU
  prefetch       on a node with network: fetch model and data, pinned and proven to load without it
  preflight      check this machine for a run, and run nothing
  sbatch         write or submit a batch script that fits this cluster
  report         curves, speed, GPU use and job efficiency of one run or several, as a page
  eval           loss, exact match and F1 of a run on other data
  generate       talk to the result
  merge          add the adapter into the base model, and prove that the result is the same
  replay         do a run again from its receipt, and compare
  verify-resume  prove on your configuration that stop and go on gives the same bits

Fine-tune a large language model with LoRA: the base weights W stay frozen, only the low-rank
update (alpha / dim) B A is trained. Writes a run directory with the adapter (plain PEFT format),
checkpoints, metrics and the resolved configuration. The same command again goes on where it
stopped.

  lora-train                                        the embedded quickstart, on CPU or GPU
  lora-train --factory llama31_8b --max-steps 250   Llama-3.1-8B on one GPU
  lora-train --factory qwen3_8b data.path=chats.jsonl optim.lr=1e-4
  lora-train sbatch --gpus 4 -- --factory llama31_8b   a batch script that fits this cluster
  lora-train preflight --factory llama31_8b         check this machine for a run, and run nothing
  lora-train generate runs/quickstart               talk to the result

options:
  --factory NAME    start from a recipe (quickstart when none is given):
                    {recipes}
  --config FILE     YAML file in the schema below, over the recipe
  --resume MODE     auto: go on in the run directory; never: start over in a new one
  --dry-run         print the resolved configuration and stop; nothing is loaded or written
  --version         print the version
  --help            this text

Every key below can be set three ways: `trainer.max_steps=250`, `--max-steps 250` (a last name that
is unique; others list their candidates), or in a --config file. Lists are [a,b], nothing is null.

A run takes all GPUs that it sees, in a Slurm job of any shape: started by srun with a task for each
GPU or for each node, without srun, by torchrun, or on a workstation.

Before a run, and with `preflight`, the machine is checked: GPU, container, driver, imports, disks,
locks, model, data. What would fail is refused with exit status 2 and the line that mends it.
"""


@functools.cache
def _docstrings() -> dict[tuple[str, str], str]:
    """(class name, field name) -> the string literal under the field."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[node.name, field.target.id] = str(text.value.value)
    return found


def field_docstring(dotted: str) -> str:
    """The docstring of one configuration key, such as `trainer.max_steps`."""
    owner: Any = Config
    *parents, leaf = dotted.split(".")
    for parent in parents:
        owner = typing.get_type_hints(owner)[parent]
    return _docstrings()[owner.__name__, leaf]


def _default(dotted: str) -> str:
    """The schema's own default as typed on a command line; empty for a required key."""
    value: Any = Config(model=schema.ModelConfig(path=""), data=schema.DataConfig(path=""))
    for part in dotted.split("."):
        value = getattr(value, part)
    if value == "":
        return "required"
    if isinstance(value, list | tuple):
        return "[" + ",".join(str(one) for one in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def help_text() -> str:
    """All of `lora-train --help`."""
    names = textwrap.wrap(", ".join(recipe_names()), 76)
    lines = [_INTRODUCTION.format(recipes=("\n" + " " * 20).join(names))]
    section = ""
    for dotted in leaf_types():
        if dotted.partition(".")[0] != section:
            section = dotted.partition(".")[0]
            lines.append(f"{section}: {_docstrings()['Config', section]}")
        lines.append(f"  {dotted}  [{_default(dotted)}]")
        lines.append(f"      {field_docstring(dotted)}")
    return "\n".join([*lines, "", EXIT_STATUS_HELP])
