"""Whether the packages that will be imported are the ones that were installed together."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.metrics import check_trackers
from lora_train.preflight.findings import Finding
from lora_train.preflight.machine import Machine

# of another version these break the run for certain, as they are tested together
_CRITICAL = ("torch", "transformers", "peft")
_OTHERS = (
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "numpy", "pydantic", "rich",
    "safetensors", "tokenizers", "triton", "yaml",
)  # fmt: skip
# where the name to install is not the one to import
_DISTRIBUTIONS = {"yaml": "PyYAML"}
# versions of `kernels` that transformers 5.23 uses: this one to below the other
_KERNELS_TAKEN = (Version("0.18.2"), Version("0.19"))
_VERSION = re.compile(r"^__version__\b[^=\n]*=\s*['\"]([^'\"]+)", re.MULTILINE)


def check_imports(machine: Machine, config: Config) -> list[Finding]:
    """Look for packages that another folder puts before the installed ones."""
    findings = [*_check_kernels(config), *_check_shadows()]
    try:
        check_trackers(config)
    except UserError as error:
        findings.append(
            Finding("imports", "error", error.message, "the run logs to it", error.hint or "")
        )
    return findings or [Finding("imports", "ok", f"from {_installed_in()}")]


def _check_kernels(config: Config) -> list[Finding]:
    findings = []
    folder = _folder_of("kernels")
    if folder is not None and _installed_version("kernels", [str(folder.parent)]) is None:
        # transformers takes the first version that it finds, and then the package for its own
        version = _installed_version("kernels", sys.path) or _written_version(folder)
        is_taken = version is not None and _is_taken(version)
        findings.append(
            Finding(
                "imports", "error" if is_taken else "warning", f"`import kernels` finds {folder}",
                "transformers takes it for the package `kernels` of Hugging Face, and then loads "
                "no model" if is_taken else
                "transformers imports it, to see whether it is the package of Hugging Face",
                f"rename {folder}, or "
                + ("unset PYTHONPATH" if _is_below(folder, _python_path()) else
                   "export PYTHONSAFEPATH=1"),
            )
        )  # fmt: skip
    if importlib.util.find_spec("lora_kernels") is None:
        findings.append(
            Finding(
                "imports",
                "error" if config.kernels.fused == "required" else "warning",
                "lora_kernels is not installed",
                "it comes with lora-train and holds the fused kernels, which a GPU runs",
                "make setup",
            )
        )
    return findings


def _is_taken(version: str) -> bool:
    try:
        return _KERNELS_TAKEN[0] <= Version(version) < _KERNELS_TAKEN[1]
    except InvalidVersion:
        return True  # transformers fails on it too


def _check_shadows() -> list[Finding]:
    installed = _installed_in()
    user_site = Path(site.getusersitepackages())
    from_user_site, from_python_path = [], []
    for name in (*_CRITICAL, *_OTHERS):
        folder = _folder_of(name)
        # where only the other folder has it, somebody installed it there on purpose
        if folder is None or not (installed / name).is_dir() or _is_below(folder, [installed]):
            continue
        if _same_version(name, folder.parent, installed):
            continue
        if _is_below(folder, [user_site]):
            from_user_site.append(name)
        elif _is_below(folder, _python_path()):
            from_python_path.append(name)
    findings = []
    for names, where, mend in (
        (from_user_site, f"the user site {user_site}", "export PYTHONNOUSERSITE=1"),
        (from_python_path, f"PYTHONPATH={os.environ.get('PYTHONPATH')}", "unset PYTHONPATH"),
    ):
        if names:
            findings.append(
                Finding(
                    "imports", "error" if set(names) & set(_CRITICAL) else "warning",
                    f"{', '.join(names)} would be imported from {where}",
                    f"lora-train was installed with others, in {installed}", mend,
                )
            )  # fmt: skip
    return findings


def _installed_in() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _folder_of(name: str) -> Path | None:
    """Return the folder a package would be imported from; None: there is none, or a namespace."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _same_version(name: str, one: Path, other: Path) -> bool:
    """Tell whether two folders hold the same version of a package, as far as they say."""
    versions = [
        _installed_version(name, [str(parent)]) or _written_version(parent / name)
        for parent in (one, other)
    ]
    return versions[0] is not None and versions[0] == versions[1]


def _installed_version(name: str, path: Sequence[str]) -> str | None:
    """Return the version of a package as its installer wrote it down."""
    found = metadata.distributions(name=_DISTRIBUTIONS.get(name, name), path=list(path))
    return next((each.version for each in found), None)


def _written_version(folder: Path) -> str | None:
    """Return the version that a package names itself, without importing it."""
    for name in ("__init__.py", "version.py", "_version.py"):
        try:
            found = _VERSION.search((folder / name).read_text(errors="replace"))
        except OSError:
            continue
        if found is not None:
            return found[1]
    return None


def _python_path() -> list[Path]:
    # an empty part is the current folder
    text = os.environ.get("PYTHONPATH")
    return [Path(part) for part in text.split(os.pathsep)] if text else []


def _is_below(path: Path, folders: list[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)
