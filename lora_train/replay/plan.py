"""What of a recorded run can be repeated, from its receipts. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_train.config import Config
from lora_train.config_loading import flatten, resolve, to_tree
from lora_train.errors import UserError
from lora_train.metrics import read_metrics
from lora_train.paths import cache_dir
from lora_train.preflight.assets import find_data
from lora_train.receipts.differences import refuse_changed_inputs
from lora_train.receipts.file_hashes import FileHash
from lora_train.receipts.start import HASHES_COMPLETE, tree_without_secrets
from lora_train.recorded_run import RecordedRun
from lora_train.replay.run_comparison import ADAPTER_FILE

# keys that say nothing about the steps
_FREE = (
    "log.", "resume.", "eval.", "trainer.devices", "trainer.num_nodes",
    "trainer.val_check_interval", "trainer.limit_val_batches", "trainer.log_every_n_steps",
)  # fmt: skip


@dataclass(frozen=True)
class ReplayPlan:
    """A run that is to be repeated."""

    receipts: list[dict[str, Any]]
    """Of the starts that made the steps to be compared; empty: an older lora-train kept none."""
    config: Config
    """With which the steps were made."""
    num_steps: int
    """Steps to compare, from the first."""
    is_whole: bool
    """Whether these are all of a complete run, so that the adapters compare too."""
    notes: list[str]
    """What cannot be compared, in words."""

    @property
    def receipt(self) -> dict[str, Any]:
        """That of the first start with all hashes, else of the first; empty: there is none."""
        hashed = [each for each in self.receipts if each["hashes"] == HASHES_COMPLETE]
        return next(iter([*hashed, *self.receipts]), {})

    def up_to(self, step: int, note: str) -> ReplayPlan:
        """Return the plan for fewer steps, with why."""
        notes = [*self.notes, note]
        return dataclasses.replace(self, num_steps=step, is_whole=False, notes=notes)


def plan_replay(run: RecordedRun, num_steps: int | None) -> ReplayPlan:
    """Find out what of a run can be repeated.

    Args:
        run: the recorded run.
        num_steps: compare the first ones only; None: all.

    Returns:
        The plan.

    Raises:
        UserError: the run has no steps, or fewer than are asked for.
    """
    rows = [row for row in read_metrics(run.path / "metrics.jsonl") if "loss" in row]
    if not rows:
        raise UserError(
            f"{run.path} has no steps to compare with",
            hint="metrics.jsonl of a run that has trained holds them",
        )
    last, notes = rows[-1]["step"], []
    is_complete = (run.path / "summary.json").is_file()
    if not is_complete:
        notes.append(f"the run is not complete: it has {last} steps, and no adapter to compare")
    receipts = [start for start in run.starts if "code" in start and "config" in start]
    if len(receipts) < len(run.starts) or not receipts:
        notes.append(
            "an older lora-train made the run, without a whole receipt: whether data, base model "
            "and settings were the same all the time cannot be compared"
        )
        receipts = []
    # what was before a start from step 0 left no steps
    begins = [number for number, start in enumerate(receipts) if start["step"] == 0]
    receipts = receipts[begins[-1] if begins else 0 :]
    config, limit = run.config, last
    if receipts:
        config = _config_of(receipts[0], run.config)
        if edited := _changed(receipts[-1]["config"], _as_recorded(run.config)):
            notes.append(f"config.yaml was edited since ({', '.join(edited)}): the receipt counts")
    for number in range(1, len(receipts)):
        before, after = receipts[number - 1], receipts[number]
        changed = _changed(before["config"], after["config"]) + _changed_base(before, after)
        if changed:
            limit = receipts[number]["step"]
            receipts = receipts[:number]
            notes.append(
                f"settings changed at step {limit} ({', '.join(changed)}): the steps before it are "
                "repeated with what made them, later ones and the adapter are not compared"
            )
            break
    unhashed = [start for start in receipts if start["hashes"] != HASHES_COMPLETE]
    if receipts and len(unhashed) == len(receipts):
        why = unhashed[0]["hashes"]
        notes.append(f"whether data and base model are what they were is not known: {why}")
    if num_steps is not None and num_steps > limit:
        raise UserError(
            f"--steps {num_steps}: {run.path} has {limit} steps to compare",
            hint=f"--steps {limit}, or leave it out",
        )
    steps = num_steps or limit
    is_whole = is_complete and steps == last == limit
    if is_whole and not (run.path / "adapter" / ADAPTER_FILE).is_file():
        is_whole = False
        notes.append(f"the run's adapter/{ADAPTER_FILE} is gone")
    return ReplayPlan(receipts, config, steps, is_whole, notes)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = dict(flatten(before)), dict(flatten(after))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def _changed_base(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = before["base"]["files"], after["base"]["files"]
    return [
        f"base model: another {name}"
        for name in sorted(old.keys() & new.keys())
        if old[name].get("sha256") != new[name].get("sha256")
    ]


def _as_recorded(config: Config) -> dict[str, Any]:
    return dict(tree_without_secrets(to_tree(config)))


def _config_of(receipt: Mapping[str, Any], config: Config) -> Config:
    """The configuration that a start recorded; `config` is that of config.yaml."""
    if receipt["config"] == _as_recorded(config):
        return config
    with tempfile.TemporaryDirectory(prefix="lora-train-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(receipt["config"]), encoding="utf-8")
        return resolve(config_file=file)


def check_inputs(plan: ReplayPlan, hash_of: Callable[[Path], FileHash]) -> ReplayPlan:
    """Refuse changed data and base; pin what comes from the hub to the commits of the receipt.

    Args:
        plan: what `plan_replay` returned.
        hash_of: returns size and SHA-256 of a file.

    Returns:
        The plan, with its revisions and what could not be compared.

    Raises:
        UserError: a file is missing or changed.
    """
    if not plan.receipts:
        return plan
    config, receipt = plan.config, plan.receipt
    if receipt["base"]["commit"] is not None:
        model = dataclasses.replace(config.model, revision=receipt["base"]["commit"])
        config = dataclasses.replace(config, model=model)
    commit = receipt["data"].get("commit")
    if commit is not None and find_data(config.data).kind == "hub":
        data = dataclasses.replace(config.data, revision=commit)
        config = dataclasses.replace(config, data=data)
    unknown = refuse_changed_inputs(receipt, config, hash_of)
    return dataclasses.replace(plan, config=config, notes=[*plan.notes, *unknown])


def enter_folder(plan: ReplayPlan) -> None:
    """Go to the folder that the run was started in, where its relative paths mean something."""
    # by default below the current folder: the one that this command was given in
    os.environ["LORA_CACHE_DIR"] = str(cache_dir())
    folder = plan.receipt.get("folder")
    if folder and os.path.isdir(folder):
        os.chdir(folder)
