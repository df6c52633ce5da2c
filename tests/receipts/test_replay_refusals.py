"""Another input is another run: replay refuses it, and starts nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Run

from lora_train.cli import main


def refusal(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["replay", str(run.folder)]) == 2
    assert not run.folder.with_name("tiny-replay").exists()
    return capsys.readouterr().err


@pytest.fixture
def run(train: Callable[..., Run], assets: Path, tmp_path: Path) -> Run:
    copy = tmp_path / "copy"
    shutil.copytree(assets, copy)
    return train(f"data.path={copy}/train.jsonl", f"model.path={copy}/model")


def test_changed_data(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "copy" / "train.jsonl"
    file.write_text(file.read_text().replace("a", "b", 1))
    message = refusal(run, capsys)
    assert f"error: this is not what the run was made of:\n  data: {file}: sha256 " in message


def test_missing_data(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "copy" / "train.jsonl"
    file.unlink()
    assert f"data: {file}: No such file or directory" in refusal(run, capsys)


def test_changed_base(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "copy" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"base model: {file}: sha256 " in refusal(run, capsys)


def test_missing_base(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "copy" / "model")
    expected = f"base model: {tmp_path}/copy/model: no such file or folder"
    assert expected in refusal(run, capsys)


def test_weights_that_were_added(
    run: Run, edit_receipt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others would be loaded than those that the receipt names, which are all unchanged."""
    model = tmp_path / "copy" / "model"
    index = {"weight_map": {"a": "model.safetensors"}}
    edit_receipt(run, lambda start: start["base"]["files"].pop("model.safetensors"))
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(run, capsys)
    assert f"base model: {model}/model.safetensors: not there when the run began" in message


def test_a_blob_that_was_cut_off(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the hub's cache the name is the hash, whatever became of the content."""
    file = tmp_path / "copy" / "model" / "model.safetensors"
    [start] = json.loads((run.folder / "environment.json").read_text())
    blob = tmp_path / "blobs" / start["base"]["files"][file.name]["sha256"]
    blob.parent.mkdir()
    blob.write_bytes(file.read_bytes()[:-1])
    file.unlink()
    file.symlink_to(blob)
    assert f"base model: {file}: sha256 " in refusal(run, capsys)


def test_a_place_that_cannot_be_written(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "hint: --output FOLDER/NAME" in refusal(run, capsys)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
