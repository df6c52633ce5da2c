"""What differs between two receipts, and which of it may give other bits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.preflight.assets import find_model
from lora_train.receipts.file_hashes import FileHash
from lora_train.receipts.inputs import base_files, recorded_files

_COMPUTING_PACKAGES = {
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "datasets",
    "tokenizers", "numpy", "safetensors",
}  # fmt: skip
_COMPUTING_VARIABLES = (
    "CUBLAS_", "NVIDIA_TF32", "TORCH_ALLOW", "ATEN_", "MKL_", "ONEDNN_", "DNNL_",
    "TRITON_INTERPRET", "NCCL_ALGO", "NCCL_PROTO",
)  # fmt: skip
_OWN_PACKAGE = "lora-hpc"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Difference:
    """One fact that is not what it was."""

    what: str
    """Such as `torch` or `GPU`."""
    then: str
    """In the receipt."""
    now: str
    """In the other one, or on this machine."""
    may_change_bits: bool = True
    """Whether the same run may give other bits with it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.then} -> {self.now}"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Compare two receipts, as far as both speak of a fact.

    Args:
        then: an entry of environment.json; an old one may lack facts.
        now: another entry, or those facts of it that are known before a run starts.

    Returns:
        What differs in program and machine; what the run read is for `changed_inputs`.
    """
    found = [*_program(then, now), *_packages(then, now), *_machine(then, now)]
    for name in sorted(set(then.get("variables", {})) | set(now.get("variables", {}))):
        if "variables" in now and "code" in then and name.startswith(_COMPUTING_VARIABLES):
            found.append(_pair(name, then["variables"].get(name), now["variables"].get(name)))
    return [each for each in found if each.then != each.now]


def _pair(what: str, then: Any, now: Any, may_change_bits: bool = True) -> Difference:
    return Difference(what, _shown(then), _shown(now), may_change_bits)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _program(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if "lora_train" in then and "lora_train" in now:
        yield _pair("lora-train", then["lora_train"], now["lora_train"])
    if "code" in then and "code" in now:
        is_same = then["code"]["sha256"] == now["code"]["sha256"]
        if not is_same:
            yield _pair("code of lora-train", _code(then["code"]), _code(now["code"]))
    if "image" in then and "image" in now:
        old, new = then["image"] or {}, now["image"] or {}
        if old.get("sha256") != new.get("sha256"):
            # what is in it is compared piece by piece
            yield _pair("image", _image(old), _image(new), may_change_bits=False)
    if "python" in then and "python" in now:
        yield _pair("Python", then["python"], now["python"])


def _code(code: Mapping[str, Any]) -> str:
    commit = f", commit {code['commit'][:10]}" if code["commit"] else ""
    return f"{code['sha256'][:10]}{commit}{' with changes' if code['dirty'] else ''}"


def _image(image: Mapping[str, Any]) -> str:
    if not image:
        return "none"
    return f"{image.get('version')} of {image.get('built')}, commit {image.get('commit')}"


def _packages(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    old, new = then.get("packages", {}), now.get("packages", {})
    # before there were receipts, eight were recorded
    names = set(old) | set(new) if "packages_sha256" in then else set(old)
    for name in sorted(names - {_OWN_PACKAGE}):
        may = name in _COMPUTING_PACKAGES or name.startswith(("nvidia-", "cuda-"))
        yield _pair(name, old.get(name), new.get(name), may)


def _machine(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if not then.get("devices") or not now.get("devices"):
        return
    yield _pair("processes", len(then["devices"]), len(now["devices"]))
    # sums over nodes are made in another order
    old_nodes, new_nodes = ({each["host"] for each in one["devices"]} for one in (then, now))
    yield _pair("nodes", len(old_nodes), len(new_nodes))
    for what, key in (("device", "name"), ("CPU threads", "threads")):
        old, new = ({each.get(key) for each in one["devices"]} for one in (then, now))
        if what == "device" or None not in old | new:
            yield _pair(what, ", ".join(map(str, sorted(old))), ", ".join(map(str, sorted(new))))
    if then.get("driver") and now.get("driver"):
        yield _pair("NVIDIA driver", then["driver"], now["driver"])


def refuse_changed_inputs(
    receipt: Mapping[str, Any], config: Config, hash_of: Callable[[Path], FileHash]
) -> list[str]:
    """Refuse to repeat a run of which the data or the base model is not what it was.

    Args:
        receipt: an entry of environment.json.
        config: the run's configuration, with the commits of the receipt.
        hash_of: returns size and SHA-256 of a file.

    Returns:
        What could not be compared, in words.

    Raises:
        UserError: a file is missing or holds something else; names all of them.
    """
    faults: list[str] = []
    unknown: list[str] = []
    recorded_data = receipt["data"]["files"]
    for name, file in recorded_files(config.data, recorded_data).items():
        if file is None:
            unknown.append(f"data: {name} is not in its cache yet: the tokens made of it tell")
        else:
            faults += _fault(f"data: {name}", file, recorded_data[name], hash_of, unknown)
    base, commit = find_model(config.model), receipt["base"]["commit"]
    recorded_base = receipt["base"]["files"]
    if base.folder is not None:
        here = base_files(config.model, base.folder)
        for name, recorded in recorded_base.items():
            file = here.get(name, base.folder / name)
            faults += _fault(f"base model: {file}", file, recorded, hash_of, unknown)
        faults += [
            f"base model: {file}: not there when the run began"
            for name, file in here.items()
            if recorded_base and name not in recorded_base and file.suffix in _WEIGHTS
        ]
    elif base.kind == "local":
        faults.append(f"base model: {config.model.path}: no such file or folder")
    else:
        at = f" at commit {commit}" if commit else ""
        unknown.append(f"the base model {base.name}{at} is not here yet: it is not compared")
    if faults:
        raise UserError(
            "this is not what the run was made of:\n  " + "\n  ".join(faults),
            hint="put the files back as they were; a run on others is a new run: "
            "lora-train --config RUN/config.yaml log.name=ANOTHER_NAME",
        )
    return unknown


def _fault(
    name: str,
    file: Path,
    recorded: Mapping[str, Any],
    hash_of: Callable[[Path], FileHash],
    unknown: list[str],
) -> list[str]:
    if "sha256" not in recorded:
        unknown.append(f"{name} was not hashed ({recorded.get('error')})")
        return []
    try:
        found = hash_of(file)
    except OSError as error:
        return [f"{name}: {error.strerror or error}"]
    # the size too: the hash of a file in the hub's cache is its name, also when it was cut off
    if found == recorded:
        return []
    return [
        f"{name}: sha256 {found['sha256'][:16]}... ({found['size']:,} bytes), in the receipt "
        f"{recorded['sha256'][:16]}... ({recorded['size']:,} bytes)"
    ]
