"""A run tells the image's GPU monitor where it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_train.config import Config
from lora_train.run import run


def test_the_run_directory_is_published(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    monkeypatch.setenv("LORA_STATE_DIR", str(state))
    config = config_of("trainer.max_steps=1")
    assert run(config, []) == 0
    published = Path((state / "run_directory").read_text().removesuffix("\n"))
    assert published == Path(config.log.log_dir, str(config.log.name)).absolute()
    assert (published / "config.yaml").exists()
