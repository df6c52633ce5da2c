"""Whether the packages that will be imported are the ones that were installed together."""

from __future__ import annotations

import importlib.util
import os
import site
import sysconfig
from pathlib import Path

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
_SITE = {"site-packages", "dist-packages"}


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
    # Hugging Face's package of that name is imported by transformers; any other breaks it
    folder = _folder_of("kernels")
    if folder is not None and not _SITE & set(folder.parts):
        findings.append(
            Finding(
                "imports", "error", f"`import kernels` finds {folder}",
                "transformers takes it for the package `kernels` of Hugging Face, and then loads "
                "no model",
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


def _check_shadows() -> list[Finding]:
    installed = _installed_in()
    user_site = Path(site.getusersitepackages())
    from_user_site, from_python_path = [], []
    for name in (*_CRITICAL, *_OTHERS):
        folder = _folder_of(name)
        # where only the other folder has it, somebody installed it there on purpose
        if folder is None or not (installed / name).is_dir() or _is_below(folder, [installed]):
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


def _python_path() -> list[Path]:
    return [Path(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _is_below(path: Path, folders: list[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)
