"""The facts of a receipt on program and machine: code, packages, image, processors, variables.

Nothing here that could let somebody else in is written down.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lora_train

_IMAGE_FILE = Path("/opt/lora/image.json")
_GIT_SECONDS = 5

_VARIABLES = (
    "SLURM_", "LORA_", "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_", "TORCH_", "PYTORCH_", "TRITON_",
    "OMP_", "MKL_", "ATEN_", "ONEDNN_", "DNNL_", "HF_", "TRANSFORMERS_", "ACCELERATE_",
    "APPTAINER_CONTAINER", "APPTAINER_NAME", "SINGULARITY_CONTAINER", "SINGULARITY_NAME",
)  # fmt: skip
_SECRET_NAME = re.compile(
    r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|JWT|COOKIE|PRIVATE|SIGNATURE|_PAT$",
    re.IGNORECASE,
)
# NAME=..., as a URL's query and SLURM_EXPORT_ENV have it; but not eval.max_new_tokens=
_SECRET_PAIR = re.compile(
    r"((?:token|secret|passw(?:or)?d|passphrase|[-_]pass|credentials?|auth|jwt|cookie|signature|sig"
    r"|(?:[-_?&,.]|\b|api|access|private)key|_pat)=)[^&,;\s]+",
    re.IGNORECASE,
)
# https://user:password@host, and what the well-known services hand out: no longer word than these
# have, as a path that looks like one would be lost
_SECRET_VALUE = re.compile(
    r"(?<=://)[^/\s]+(?=@)"
    r"|\b(?:hf_|gh[pousr]_|glpat-|xox[abeprs]-|sk-(?:\w+-)*)[A-Za-z0-9]{18,}[\w-]*"
    r"|\bgithub_pat_\w{20,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*"
)


def safe_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that say what job this is and how it computes, without secrets.

    Args:
        environment: all variables.

    Returns:
        Those of Slurm, CUDA, torch and their like, sorted; none whose name speaks of a secret, and
        no credentials in the values.
    """
    return {
        name: without_secrets(value)
        for name, value in sorted(environment.items())
        if name.startswith(_VARIABLES) and not _SECRET_NAME.search(name)
    }


def without_secrets(text: str) -> str:
    """Return a text with what looks like credentials replaced by ***."""
    return _SECRET_VALUE.sub("***", _SECRET_PAIR.sub(r"\1***", text))


def program() -> dict[str, Any]:
    """Return what computes: version and hash of the code, image, Python, all packages."""
    packages = _packages()
    listed = "".join(f"{name}=={version}\n" for name, version in packages.items())
    return {
        "lora_train": lora_train.__version__,
        "code": _code(),
        "image": _image(),
        "python": platform.python_version(),
        "packages": packages,
        "packages_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def image_file() -> Path | None:
    """Return the SIF file that this process runs in, where it can be seen from inside."""
    names = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
    text = next(filter(None, map(os.environ.get, names)), None)
    return Path(text) if text and Path(text).is_file() else None


def cpu_model() -> str:
    """Return the name of this node's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def device_facts(device: Any) -> dict[str, Any]:
    """Return what a process of the run computes on.

    Args:
        device: a torch device.

    Returns:
        host, name, and memory_bytes and capability of a GPU, or the threads of a CPU.
    """
    import torch

    facts: dict[str, Any] = {"host": platform.node()}
    if device.type != "cuda":
        return {**facts, "name": cpu_model(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **facts,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


@functools.cache
def _packages() -> dict[str, str]:
    """Name -> version of all that is installed; of two with one name, the one that is imported."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.name or "").lower()
        if name:
            found.setdefault(name, package.version)
    return dict(sorted(found.items()))


@functools.cache
def _code() -> dict[str, Any]:
    """SHA-256 over our own source files; commit, and whether files changed, in a checkout."""
    import lora_kernels

    digest = hashlib.sha256()
    for package in (lora_train, lora_kernels):
        folder = Path(str(package.__file__)).parent
        # the launch tables too: other tiles add up in another order
        for file in sorted(each for each in folder.rglob("*") if each.suffix in (".py", ".json")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    commit = dirty = None
    root = Path(str(lora_train.__file__)).parents[1]
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", "lora_train", "kernels")
        dirty = None if changes is None else bool(changes)
    return {"sha256": digest.hexdigest(), "commit": commit, "dirty": dirty}


def _git(root: Path, *words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *words],
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=_GIT_SECONDS,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or the checkout is another user's
        return None


def _image() -> dict[str, Any] | None:
    """What the image says of itself; None outside of it. `sha256` is that of its description."""
    names = ("version", "commit", "built", "base", "torch", "cuda")
    facts: dict[str, Any] = {}
    try:
        text = _IMAGE_FILE.read_bytes()
        facts = {name: json.loads(text).get(name) for name in names}
        facts["sha256"] = hashlib.sha256(text).hexdigest()
    except (OSError, ValueError):
        if image_file() is None:
            return None
    return {**facts, "file": None if (file := image_file()) is None else str(file)}
