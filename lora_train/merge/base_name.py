"""The name that an adapter gives its base model: one that means the same on every machine.

PEFT writes the path that the base was loaded from, which whoever gets the adapter does not have.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_train.paths import atomic_file
from lora_train.prefetch.manifest import of_bundle
from lora_train.quickstart import MODEL_REFERENCE

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A model of an organization, org/name."""

EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model was made from, by way of a 4-bit (Q4_1) file."""

# hub--org--name/snapshots/<commit>, as huggingface_hub lays out its cache
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/*$")


@dataclass(frozen=True)
class BaseName:
    """How an adapter names its base model."""

    name: str
    """Hub name; where none is known, the name of the folder."""
    revision: str | None = None
    """Commit, or what was asked for where the commit is not known."""
    warning: str | None = None
    """Why it may not be found by this name."""


def portable_name(path: str, revision: str | None = None, commit: str | None = None) -> BaseName:
    """Return a name of the base model that does not depend on this machine.

    Args:
        path: `model.path`, or the folder that it stands for.
        revision: `model.revision`.
        commit: commit of the hub model that was loaded, if known.

    Returns:
        The hub name with the commit, if it can be told.
    """
    if path == MODEL_REFERENCE:
        return BaseName(EMBEDDED_NAME)
    local = Path(os.path.expanduser(path))
    # old models of the hub belong to no organization: gpt2
    if not local.exists() and re.fullmatch(rf"({HUB_NAME.pattern}|[\w-]+)", path):
        return BaseName(path, commit or revision)
    for each in (str(local), str(local.resolve())):
        if (match := _SNAPSHOT.search(each)) is not None:
            return BaseName(f"{match[1]}/{match[2]}", match[3])
    fetched = of_bundle(local)
    if fetched is not None and fetched.kind == "hub":
        return BaseName(fetched.name, fetched.commit)
    if fetched is not None and fetched.kind == "embedded":
        return BaseName(EMBEDDED_NAME)
    stated = _stated_name(local)
    if stated is not None:
        return BaseName(stated, commit)
    name = local.stem if local.suffix == ".gguf" else local.resolve().name
    return BaseName(
        name,
        commit,
        f"nothing tells the hub name of {path}: the adapter names its base {name!r}, which nobody "
        "else can load by; `lora-train merge RUN --base-name ORG/NAME` writes the right name",
    )


def _stated_name(folder: Path) -> str | None:
    """Return the hub name that a model folder's config.json gives, if it gives one."""
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    is_name = isinstance(stated, str) and HUB_NAME.fullmatch(stated) is not None
    return stated if is_name and not Path(stated).exists() else None


def write_base_name(adapter: Path, base: BaseName) -> None:
    """Change the base model's name in an adapter's settings.

    Args:
        adapter: folder in PEFT's format.
        base: the name.

    Raises:
        OSError: it cannot be written.
    """
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base.name, "revision": base.revision}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    with atomic_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
