"""Loading again what was fetched, in a process that has no network, as a run does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lora_train.errors import LoraTrainError, UserError

_NUM_FORMATTED = 100
_QUIET_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
_CACHES = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "NEMO_DATASETS_CACHE",
)  # fmt: skip


def try_offline(words: list[str], bundle: Path | None) -> dict[str, Any]:
    """Load model and data in a new process without network.

    Args:
        words: the command line that a node without network will use.
        bundle: the bundle; it must do without any cache. None: the hub cache is used.

    Returns:
        What was loaded, in numbers.

    Raises:
        UserError: something cannot be loaded; says what.
    """
    # no GPU of a login node is touched
    variables = {**os.environ, **_QUIET_OFFLINE, "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.ExitStack() as stack:
        if bundle is not None:
            empty = stack.enter_context(tempfile.TemporaryDirectory(prefix=".trial-", dir=bundle))
            variables = {name: value for name, value in variables.items() if name not in _CACHES}
            variables |= dict.fromkeys(("HF_HOME", "LORA_CACHE_DIR", "NEMO_HOME"), empty)
        # -P: nothing of the current folder is imported
        command = [sys.executable, "-P", "-m", "lora_train.prefetch.trial", *words]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise UserError(
            "what was fetched cannot be loaded without network; the reason stands above",
            hint="mend that, and give the same command again: complete files are kept",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def refuse_network() -> None:
    """Let no socket of this process reach the network from now on.

    An audit hook sees what each of Python's libraries does, and cannot be taken away again.
    """

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]
            is_local = isinstance(address, str | bytes) or address is None  # AF_UNIX
        else:
            is_local = event not in ("socket.getaddrinfo", "socket.gethostbyname")
        if not is_local:
            raise ConnectionRefusedError(f"the trial has no network ({event})")

    sys.addaudithook(refuse)


def _load(words: list[str]) -> dict[str, Any]:
    from lora_train.cli import parse_command_line
    from lora_train.data.examples import read_examples
    from lora_train.data.rendering import ChatRenderer, render_examples
    from lora_train.data.sources import find_sources
    from lora_train.model import load_tokenizer
    from lora_train.model_source import download_model

    config = parse_command_line(words).resolve()
    download_model(config.model)
    tokenizer = load_tokenizer(config.model)
    folder = _model_folder(config.model)
    num_tensors, num_files = read_weights(folder, pickled=config.model.allow_pickle)
    sources = find_sources(config.data, config.trainer.seed)
    counts = {}
    for name, split in (("train", sources.train), ("validation", sources.validation)):
        if split is None:
            continue
        # the first file stands for the others, which a login node may have no memory for
        examples = read_examples(
            dataclasses.replace(split, files=split.files[:1]), config.data.format
        )
        counts[name] = len(examples.items)
        chats = ChatRenderer(tokenizer, learn_everything=config.data.train_on == "all")
        rendered = render_examples(examples.items[:_NUM_FORMATTED], chats)
        examples.refuse(
            [(index, row) for index, row in enumerate(rendered) if isinstance(row, Exception)]
        )
    return {
        "tensors": num_tensors,
        "weight_files": num_files,
        "tokens": len(tokenizer),
        "rows": counts,
    }


def _model_folder(config: Any) -> Path:
    from lora_train.model_source import resolve_model
    from lora_train.preflight.hub import cached_model, hub_cache

    source = Path(resolve_model(config))
    if source.is_dir():
        return source
    found = cached_model(hub_cache(), config.path, config.revision)
    assert found is not None  # it was just loaded from there
    return found


def read_weights(folder: Path, *, pickled: bool) -> tuple[int, int]:
    """Read the names of a model's weights, from the files that a run loads.

    Args:
        folder: the model's folder.
        pickled: whether .bin files may be loaded, where there are no safetensors.

    Returns:
        How many tensors there are, in how many files.

    Raises:
        UserError: there are none; a file is missing or cut off, or has not what the index promises.
    """
    from lora_train.preflight.hub import promised_weights

    other = "the repository itself is incomplete: take another revision"
    try:
        promised = promised_weights(folder, pickled=pickled)
    except ValueError as unreadable:
        raise UserError(f"{folder}: {unreadable} cannot be read", hint=other) from unreadable
    if promised is None:
        raise UserError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json",
            hint="transformers loads no weights of other names: take another model",
        )
    count = 0
    for name, tensors in promised.items():
        try:
            held = _names_in(folder / name)
        except Exception as error:  # also of pickle
            message = f"{folder / name}: the weights cannot be read: {error}"
            raise UserError(message, hint=other) from error
        if lost := sorted(tensors - held):
            raise UserError(
                f"{folder / name} lacks {len(lost)} tensors that the index promises, such as "
                f"{lost[0]}",
                hint=other,
            )
        count += len(held)
    return count, len(promised)


def _names_in(file: Path) -> set[str]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            return set(weights.keys())
    import torch

    # only the zip format of torch >= 1.6 can be looked into without reading all of it
    is_zip = zipfile.is_zipfile(file)
    return set(torch.load(file, map_location="meta", mmap=is_zip, weights_only=True))


def main() -> int:
    """Load what the words of a run name, without network, and print what was loaded as JSON.

    Returns:
        The exit status: 0, or 2 with the error on stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the command says that it was stopped
    refuse_network()
    # it reports a CPU kernel that it has a spare for, and does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        print(json.dumps(_load(sys.argv[1:])))
    except LoraTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
