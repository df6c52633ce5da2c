"""A run directory as others read it: what a run wrote, finished or not. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.config import Config
from lora_train.errors import UserError


@dataclass(frozen=True)
class RecordedRun:
    """The directory of a run and the configuration in it; the rest is read when asked for."""

    path: Path
    config: Config

    @property
    def name(self) -> str:
        """What tables and plots call the run."""
        return self.path.absolute().name

    def read_json(self, name: str) -> Any:
        """A JSON file of the run, or None when it is not there, not readable or cut off."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What environment.json tells of each start of the run."""
        return self.read_json("environment.json") or []

    def adapter(self) -> tuple[Path, int | None]:
        """Return the folder of the adapter, and its step while the run is not finished.

        Returns:
            The finished adapter and None, else the newest complete checkpoint's and its step.

        Raises:
            UserError: the run has neither an adapter nor a complete checkpoint yet.
        """
        from lora_train.checkpoint import newest_complete

        adapter = self.path / "adapter"
        if (adapter / "adapter_config.json").is_file():
            return adapter, None
        checkpoint = newest_complete(self.path / "checkpoints")
        if checkpoint is None:
            raise UserError(
                f"{self.path} has neither an adapter nor a complete checkpoint yet",
                hint="give the run's command again to go on with it",
            )
        return checkpoint.adapter, checkpoint.step


def read_run(folder: Path) -> RecordedRun:
    """Open a run directory for reading.

    Args:
        folder: the run directory.

    Returns:
        The run, with its configuration validated.

    Raises:
        UserError: it is none; names the runs beside it.
    """
    from lora_train.config_loading import resolve

    config_file = folder / "config.yaml"
    if not config_file.is_file():
        what = "has no config.yaml" if folder.is_dir() else "does not exist"
        siblings = folder.parent.glob("*/config.yaml") if folder.parent.is_dir() else []
        runs = ", ".join(sorted(str(each.parent) for each in siblings))
        raise UserError(
            f"run directory {folder} {what}",
            hint=f"runs here: {runs}" if runs else "`lora-train` makes one under runs/",
        )
    return RecordedRun(folder, resolve(config_file=config_file))
