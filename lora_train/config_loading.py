"""Recipe, configuration file and command line -> one validated `Config`; all mistakes at once.

Later sources win: recipe, then `--config` file, then the command line. pydantic checks the merged
tree in one go; this module adds where each value came from, and the nearest known name for an
unknown one.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_train.combinations import conflicts
from lora_train.config import Config, LrSchedulerConfig, TrainerConfig
from lora_train.config_yaml import did_you_mean, parse_yaml, read_yaml
from lora_train.errors import UserError

RECIPES_DIR = Path(__file__).parent / "recipes"
DEFAULT_FACTORY = "quickstart"

# what the same thing is called in transformers, PEFT, TRL, axolotl and Lightning
_OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "rank": "peft.dim",
    "r": "peft.dim",
    "lora_r": "peft.dim",
    "lora_rank": "peft.dim",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "num_train_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "batch_size": "data.global_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "max_length": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "dataset": "data.path",
    "model_name_or_path": "model.path",
    "output_dir": "log.log_dir",
    "max_grad_norm": "trainer.gradient_clip_val",
    "packing": "data.packed_sequence",
    "gpus": "trainer.devices",
}
# keys that are often given a variable which the job does not have, and what to write instead
_EMPTY = {
    "trainer.devices": "SLURM_GPUS_PER_NODE is set by --gpus-per-node only, not by --gres, --gpus "
    "or --gpus-per-task: trainer.devices=auto takes the processes that are started, one for a GPU"
}
# two ways to say one thing: the first decides unless it is null, then the other; its default
_RIVALS = (
    ("trainer.max_steps", "trainer.max_epochs", TrainerConfig.max_epochs),
    (
        "optim.lr_scheduler.warmup_steps",
        "optim.lr_scheduler.warmup_ratio",
        LrSchedulerConfig.warmup_ratio,
    ),
)
_NULL_WORDS = {"null", "none"}
_TYPED_COUNT = re.compile(r"^[\w.-]+:(\d+)$")


@functools.cache
def leaf_types() -> dict[str, Any]:
    """Dotted name of every configuration key -> its type annotation, in schema order."""

    def walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
        hints = typing.get_type_hints(section, include_extras=True)
        for each in dataclasses.fields(section):
            annotation, name = hints[each.name], prefix + each.name
            if dataclasses.is_dataclass(annotation):
                yield from walk(typing.cast(type, annotation), f"{name}.")
            else:
                yield name, annotation

    return dict(walk(Config, ""))


def section_names() -> list[str]:
    """Dotted names of the sections, such as `optim.lr_scheduler`."""
    found = {name.rpartition(".")[0] for name in leaf_types()}
    return sorted(found | {name.partition(".")[0] for name in found})


def recipe_names() -> list[str]:
    """Names that `--factory` takes."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Read the recipe that `--factory NAME` means.

    Args:
        name: the recipe's name.

    Returns:
        Its sections, as far as they differ from the schema's defaults.

    Raises:
        UserError: there is no recipe of that name; says which there are.
    """
    if name not in recipe_names():
        nearest = did_you_mean(name, recipe_names())
        raise UserError(
            f"no recipe `{name}`; recipes: {', '.join(recipe_names())}",
            hint=nearest or "a file of your own goes with --config FILE",
        )
    return read_yaml(RECIPES_DIR / f"{name}.yaml")


def resolve(
    *,
    factory: str | None = None,
    config_file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
) -> Config:
    """Merge the sources and validate the result.

    Args:
        factory: recipe name. None: the quickstart, unless `config_file` names a model and data
            itself.
        config_file: YAML file in the schema of `config.py`, over the recipe.
        overrides: dotted name -> text as typed on the command line, over both.
        problems: mistakes already found in the command line, reported with the others.

    Returns:
        The validated configuration, `log.name` filled in.

    Raises:
        UserError: any number of mistakes, each with its dotted name, where it came from, what was
            found, what is allowed, and the nearest known name.
    """
    file_tree = read_yaml(config_file) if config_file else {}
    if factory is None and not {"model", "data"} <= file_tree.keys():
        factory = DEFAULT_FACTORY
    layers: list[tuple[str, dict[str, Any]]] = []
    if factory is not None:
        layers.append((f"recipe {factory}", _file_values(load_recipe(factory), factory)))
    if config_file is not None:
        layers.append((str(config_file), _file_values(file_tree, str(config_file))))
    typed = {dotted: parse_value(dotted, text) for dotted, text in (overrides or {}).items()}
    layers.append(("command line", typed))

    flat: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems = list(problems)
    for source, values in layers:
        problems += _unset_rivals(flat, values, source)
        flat |= values
        origin |= dict.fromkeys(values, source)
    if flat.get("log.name") is None:
        flat["log.name"] = factory or (config_file.stem if config_file else "run")

    problems += [_unknown_key(name, origin[name]) for name in flat if name not in leaf_types()]
    config, invalid = _validate({k: v for k, v in flat.items() if k in leaf_types()}, origin)
    problems += invalid
    if config is not None:
        problems += conflicts(config)
    if problems or config is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
        raise UserError(
            "\n  ".join([count + ":", *problems]),
            hint="`lora-train --help` lists every key; `--dry-run` shows the resolved values",
        )
    return config


def _unset_rivals(flat: dict[str, Any], values: Mapping[str, Any], source: str) -> list[str]:
    """Take from `flat` what a later source's `values` say in another way, such as epochs for steps.

    Both in one source are a mistake, unless one is at its default: a resolved file has all keys.
    """
    problems = []
    for deciding, other, default in _RIVALS:
        if values.get(deciding) is not None:
            if values.get(other, default) != default:
                problems.append(
                    f"{deciding} and {other}: both given ({source}), only one can count"
                )
            flat.pop(other, None)
        elif other in values:
            flat.pop(deciding, None)
    return problems


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that `--config` takes back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def parse_value(dotted: str, text: str) -> Any:
    """Read one command-line value in NeMo's grammar, as far as its type needs it.

    Numbers (`1_000`, `2e-4`) and booleans (`true/yes/on/1`) stay text: pydantic reads them by the
    key's type.

    Args:
        dotted: the key the value is for; may be unknown.
        text: the value as typed.

    Returns:
        None, a list, a dict, or text.
    """
    annotation = leaf_types().get(dotted)
    stripped = text.strip()
    if stripped.lower() in _NULL_WORDS and annotation is not None:
        return None
    if stripped[:1] in "[{(" and stripped and not _accepts(annotation, str):
        return _parse_collection(stripped)
    if stripped[:1] in "[{(" and stripped and _accepts(annotation, list):
        return _parse_collection(stripped)
    if dotted == "trainer.devices" and (typed := _TYPED_COUNT.match(stripped)):
        return typed.group(1)  # Slurm's typed count: SLURM_GPUS_PER_NODE=a100:2
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    return stripped[1:-1] if quoted else stripped


def _parse_collection(text: str) -> Any:
    try:
        return ast.literal_eval(text)  # ['a','b'] as a Python literal, as NeMo has it
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return parse_yaml(text)  # [a,b] and {a: 1}
    except ValueError:
        return text  # not a collection after all: validation names it


def _plain(dotted: str, value: Any) -> Any:
    """A YAML value, kept from being turned into another type: `dim: true` is not the number 1."""
    if isinstance(value, bool) and not _accepts(leaf_types().get(dotted), bool):
        return str(value).lower()
    if isinstance(value, str) and not _accepts(leaf_types().get(dotted), str):
        return parse_value(dotted, value)  # PyYAML reads 1e-4 and 1_000.0 as text
    return value


def _accepts(annotation: Any, kind: type) -> bool:
    """Whether a value of type `kind` can be meant by the annotation."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _accepts(typing.get_args(annotation)[0], kind)
    if origin is typing.Literal:
        return any(type(choice) is kind for choice in typing.get_args(annotation))
    if origin in (list, dict, tuple):
        return kind is origin
    arguments = typing.get_args(annotation)
    return any(_accepts(one, kind) for one in arguments) if arguments else annotation is kind


def _file_values(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        return {dotted: _plain(dotted, value) for dotted, value in flatten(tree)}
    except RecursionError as error:  # an alias inside its own anchor
        raise UserError(f"{source}: nested too deeply") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a tree's values under their dotted names; a mapping that is one key's value stays."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted not in leaf_types():
            if not value and dotted not in section_names():
                yield dotted, value  # an unknown empty section is a mistake too
            yield from flatten(value, f"{dotted}.")
        elif dotted in section_names() and value is None:
            continue  # `optim:` with nothing under it
        else:
            yield dotted, value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _validate(flat: dict[str, Any], origin: dict[str, str]) -> tuple[Config | None, list[str]]:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_python(_nest(flat)), []
    except ValidationError as error:
        problems: dict[str, list[Any]] = {}
        for detail in error.errors():
            parts = [str(part) for part in detail["loc"]]
            cut = next(
                (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in leaf_types()), 0
            )
            problems.setdefault(".".join(parts[:cut] or parts), []).append(detail)
        return None, [
            _invalid_value(name, details, flat, origin) for name, details in problems.items()
        ]


def _invalid_value(
    name: str, details: list[Any], flat: dict[str, Any], origin: dict[str, str]
) -> str:
    if all(detail["type"] == "missing" for detail in details):
        return f"{name}: required, and not given"
    if flat.get(name, "") is None:
        return f"{name}: cannot be null ({origin.get(name)})"
    if flat.get(name) == "" and name in _EMPTY:
        return f"{name}: empty, as an unset variable is ({origin.get(name)}); {_EMPTY[name]}"
    # a key of several forms (a number or `auto`) fails once per form: say them all
    messages = list(dict.fromkeys(_lower_first(detail["msg"]) for detail in details))
    return f"{name}: {' or '.join(messages)}; found {flat.get(name)!r} ({origin.get(name)})"


def _lower_first(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _unknown_key(name: str, source: str) -> str:
    if name in section_names():
        inside = ", ".join(key for key in leaf_types() if key.startswith(f"{name}."))
        return f"{name}: a section, not a key ({source}); its keys: {inside}"
    return f"{name}: unknown key ({source}){nearest_key(name)}"


def nearest_key(name: str) -> str:
    """`; did you mean ...` for an unknown dotted name or leaf name, or nothing."""
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in leaf_types() if key.rpartition(".")[2] == leaf]
    if leaf in _OTHER_NAMES:
        same_leaf = [_OTHER_NAMES[leaf]]
    close = same_leaf or difflib.get_close_matches(name, list(leaf_types()), n=1, cutoff=0.75)
    if not close:
        leaves = {key.rpartition(".")[2]: key for key in leaf_types()}
        close = [
            leaves[found] for found in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
        ]
    return f"; did you mean {' or '.join(f'`{key}`' for key in close)}?" if close else ""
