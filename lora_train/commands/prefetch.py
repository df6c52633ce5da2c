"""`lora-train prefetch`: fetch what a run needs while there is network; check it later."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import lora_train
from lora_train import exit_status
from lora_train.cli import parse_command_line
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.paths import cache_dir
from lora_train.prefetch.manifest import (
    NAME,
    Fetched,
    Manifest,
    check_files,
    read_manifest,
    refuse_damaged,
)
from lora_train.preflight.findings import in_bytes
from lora_train.preflight.machine import Machine

_HELP = """\
usage: lora-train prefetch [the words of a run] [--bundle DIR]
       lora-train prefetch --verify DIR|MANIFEST

Fetch the model and the data of a run on a node with network, so that it needs none. Branches are
pinned to commits, every file is checked by its hash, and all of it is loaded again in a process
without network. Only then it says `ready`, with the command line that uses it offline.

  lora-train prefetch --factory llama31_8b data.path=org/set
      into the hub cache (HF_HOME), which login and compute nodes share
  lora-train prefetch --factory llama31_8b data.path=squad --bundle llama
      into the folder llama, with files of this machine that the run reads, to be copied to a
      cluster without network: rsync -a llama cluster:/scratch/me/
  lora-train prefetch --verify /scratch/me/llama
      there: read every file and compare it with its hash; prints the command line for that place

The same command again goes on where it stopped; complete files are kept. It needs HF_TOKEN, or
`hf auth login`, for gated models. The exit status is 2 if anything is missing or damaged.

`lora-train --help` lists the words of a run.
"""

# what says where a cache is, for whom it matters
_CACHES = {
    "hub": ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    "squad": ("NEMO_HOME", "NEMO_DATASETS_CACHE"),
    "embedded": ("LORA_CACHE_DIR",),
    "gguf": ("LORA_CACHE_DIR",),
}
# of a manifest's file; names of files end at 255 bytes
_LONGEST_NAME = 120
_KEYS = {
    "model": "model.path",
    "data": "data.path",
    "validation": "data.validation_path",
    "chat_template": "model.chat_template",
}


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train prefetch`: those of the run, and --bundle or --verify.

    Returns:
        The exit status.

    Raises:
        UserError: the words make no valid configuration; something cannot be fetched or loaded, or
            is not what was fetched.
    """
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return exit_status.OK
    words, options = _take_options(argv)
    if "--verify" in options:
        if words or "--bundle" in options:
            raise UserError("--verify stands alone", hint="lora-train prefetch --verify DIR")
        return _verify(Path(options["--verify"]).expanduser())
    bundle = Path(options["--bundle"]).expanduser() if "--bundle" in options else None
    words = words[1:] if words[:1] == ["train"] else words
    parsed = parse_command_line(words)
    return _prefetch(words, parsed.resolve(), parsed.config_file, bundle)


def _take_options(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    words, options = [], {}
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        name, has_value, value = word.partition("=")
        if name not in ("--bundle", "--verify"):
            words.append(word)
            continue
        if not has_value:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("-") else ""
        if not value:
            raise UserError(f"{name}: needs a value", hint=f"lora-train prefetch ... {name} DIR")
        options[name] = value
    return words, options


def _prefetch(
    words: list[str], config: Config, config_file: Path | None, bundle: Path | None
) -> int:
    from lora_train.prefetch.contents import data_part, file_part, model_part, squad_part
    from lora_train.prefetch.fetching import fetch, one_at_a_time, open_bundle
    from lora_train.prefetch.trial import try_offline

    model, data = model_part(config.model), data_part(config)
    parts = [model, data]
    if config.data.validation_path is not None:
        parts.append(file_part("validation", config.data.validation_path))
    if config.model.chat_template is not None:
        parts.append(file_part("chat_template", config.model.chat_template))
    if bundle is not None and config_file is not None:
        parts.append(file_part("config", config_file))
    if bundle is not None:
        open_bundle(bundle)
    for part in parts:
        if part.remote:
            size = in_bytes(sum(file.size for file in part.remote))
            print(f"{part.role}: {part.name} at {part.commit}, {size}", file=sys.stderr)
    name = re.sub(r"[^\w.-]+", "-", f"{config.model.path}--{config.data.path}")
    name = name[-_LONGEST_NAME:].strip("-.")
    file = bundle / NAME if bundle else cache_dir() / "prefetch" / f"{name}.json"
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(bundle, name):
        if data.kind == "squad" and data.remote:
            # NeMo's files are made of the hub's, once for this machine
            fetch([data], config, None)
            parts[1] = squad_part(config, data)
        manifest = Manifest(
            lora_train.__version__,
            tuple(words),
            bundle is not None,
            tuple(fetch(parts, config, bundle)),
        )
        print("loading it again in a process without network", file=sys.stderr)
        loaded = try_offline(offline_words(manifest, file.parent), bundle)
        with _writing(file):
            manifest.write(file)
    for fetched in manifest.fetched:
        _describe(fetched)
    rows = " and ".join(f"{count:,} rows of {name}" for name, count in loaded["rows"].items())
    print(
        f"loaded without network: {loaded['tensors']:,} tensors of {loaded['weight_files']} "
        f"weight file(s), a tokenizer of {loaded['tokens']:,} tokens, {rows}"
    )
    print(f"manifest: {file}")
    if bundle is not None:
        moved = shlex.quote(f"/path/there/{bundle.absolute().name}")
        print(
            f"copy the bundle: rsync -a {shlex.quote(str(bundle))} CLUSTER:/path/there/\n"
            f"there, for its command line: lora-train prefetch --verify {moved}"
        )
    _say_ready(manifest, file.parent)
    return exit_status.OK


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror or error}",
            hint="export LORA_CACHE_DIR=DIR, or --bundle DIR, with a folder that can be written",
        ) from error


def _describe(fetched: Fetched) -> None:
    count = len(fetched.files)
    size = f"{count} file{'s' if count > 1 else ''}, {in_bytes(fetched.size)}"
    if fetched.commit is None:
        print(f"{fetched.role}: {fetched.name}: {size}")
        return
    print(
        f"{fetched.role}: {fetched.name} {fetched.requested or 'main'} -> {fetched.commit}: {size}"
    )
    if fetched.kind == "hub":
        print(f"    {fetched.role}.revision={fetched.commit}")


def _verify(path: Path) -> int:
    file = path / NAME if path.is_dir() else path
    manifest = read_manifest(file)
    mend = "copy it again: rsync -a --checksum SOURCE/ " + shlex.quote(f"{path}/")
    if not manifest.is_bundle:
        mend = shlex.join(["lora-train", "prefetch", *manifest.words])
    count = sum(len(fetched.files) for fetched in manifest.fetched)
    size = in_bytes(sum(fetched.size for fetched in manifest.fetched))
    print(f"reading {count} files, {size}", file=sys.stderr)
    refuse_damaged(check_files(manifest, file.parent), path, mend)
    print(f"{count} files, {size}: each is there with the hash that it was fetched with")
    _say_ready(manifest, file.parent)
    return exit_status.OK


def offline_words(manifest: Manifest, place: Path) -> list[str]:
    """Return the words of the run that use what was fetched.

    Args:
        manifest: what was fetched.
        place: the folder of the manifest; a bundle may have been moved.

    Returns:
        The words given then, with the commits, or with the bundle's folders, in them.
    """
    parsed = parse_command_line(manifest.words)
    keys: dict[str, str] = dict(parsed.overrides)
    config_file = parsed.config_file
    for fetched in manifest.fetched:
        path = place.absolute() / fetched.path
        if fetched.role == "config":
            config_file = path
        elif manifest.is_bundle:
            keys[_KEYS[fetched.role]] = str(path)
            keys.pop(f"{fetched.role}.revision", None)
        elif fetched.kind == "hub" and fetched.commit:
            keys[f"{fetched.role}.revision"] = fetched.commit
    return [
        *(["--factory", parsed.factory] if parsed.factory else []),
        *(["--config", str(config_file)] if config_file else []),
        *(f"{key}={value}" for key, value in keys.items()),
    ]


def _say_ready(manifest: Manifest, place: Path) -> None:
    machine = Machine()
    options = machine.gpu_options
    if machine.container == "docker":
        options += ' -v "$PWD":/workspace'
    line = machine.shell_line(
        "lora-train", offline_words(manifest, place), _variables(manifest), options
    )
    print(f"ready; without network:\n  {line}")


def _variables(manifest: Manifest) -> Mapping[str, str]:
    found = {"HF_HUB_OFFLINE": "1"}
    if not manifest.is_bundle:
        names = [name for each in manifest.fetched for name in _CACHES.get(each.kind, ())]
        found |= {name: os.environ[name] for name in names if os.environ.get(name)}
    return found
