"""What environment.json tells of a run, and what it never tells."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Run

from lora_train.config import Config, DataConfig, ModelConfig
from lora_train.config_loading import read_yaml
from lora_train.data.hub_dataset import notes_file
from lora_train.data.sources import find_sources
from lora_train.data.split_notes import SplitNotes
from lora_train.receipts import machine as receipt_machine
from lora_train.receipts import start as receipt
from lora_train.receipts.file_hashes import FileHashes
from lora_train.receipts.inputs import (
    base_commit,
    base_folder,
    data_commit,
    data_files,
    hash_base,
    model_config,
    recorded_files,
)
from lora_train.receipts.machine import safe_variables, without_secrets

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "SLURM_JWT": "eyJhbGciOi.eyJzdWIiOi.c2ln",
    "HF_TOKEN": "hf_abcdefghijklmnopqrst",
    "SLURM_SPANK_SITE_SECRET": "hunter-one",
    "LORA_REGISTRY_PASSWORD": "hunter-two",
    "NCCL_SOCKET_AUTH": "hunter-three",
    "TORCH_HOME_API_KEY": "hunter-four",
}


def starts(run: Run) -> list[dict[str, Any]]:
    return json.loads((run.folder / "environment.json").read_text())


def expected(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_made_the_run(train: Callable[..., Run], assets: Path, tmp_path: Path) -> None:
    run = train()
    [start] = starts(run)
    model = assets / "model"
    assert start["command"] == ["lora-train", *run.words]
    assert (start["folder"], start["step"]) == (str(tmp_path), 0)
    assert start["config"] == read_yaml(run.folder / "config.yaml")
    assert start["packages"]["torch"] == metadata.version("torch")
    assert list(start["packages"]) == sorted(start["packages"])
    assert len(start["packages_sha256"]) == len(start["code"]["sha256"]) == 64
    assert start["devices"][0]["threads"] == 1
    assert start["model_config"] == json.loads((model / "config.json").read_text())
    names = {"config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert start["base"] == {
        "path": str(model),
        "revision": None,
        "commit": None,
        "files": {name: expected(model / name) for name in names},
    }
    data = assets / "train.jsonl"
    assert start["data"]["files"] == {str(data): expected(data)}
    assert start["hashes"] == "complete"


def test_each_start_has_its_own(train: Callable[..., Run]) -> None:
    run = train()
    train("optim.lr=1e-3", num_steps=6)
    first, second = starts(run)
    assert (first["step"], second["step"]) == (0, 4)
    assert (first["config"]["optim"]["lr"], second["config"]["optim"]["lr"]) == (1e-2, 1e-3)
    assert first["data"] == second["data"]


def test_no_secret_is_written(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("LORA_PROXY", "http://me:hunter-five@proxy:3128/")
    monkeypatch.setenv("SLURM_JOB_COMMENT", "hf_zyxwvutsrqponmlkjihg")
    monkeypatch.setenv("SLURM_EXPORT_ENV", "ALL,WANDB_API_KEY=hunter-six,DB_PASS=hunter-seven,A=1")
    run = train("log.trackers=[]")
    text = (run.folder / "environment.json").read_text()
    for value in (*SECRETS.values(), "hunter-", "hf_zyxw"):
        assert value not in text
    variables = starts(run)[0]["variables"]
    assert variables["SLURM_EXPORT_ENV"] == "ALL,WANDB_API_KEY=***,DB_PASS=***,A=1"
    assert starts(run)[0]["variables"]["SLURM_JOB_ID"] == "71"
    assert starts(run)[0]["variables"]["LORA_PROXY"] == "http://***@proxy:3128/"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("data.path=https://me:word@host/a.jsonl", "data.path=https://***@host/a.jsonl"),
        ("https://host/a?token=abc&b=1", "https://host/a?token=***&b=1"),
        ("https://me:p@ss@host/a", "https://***@host/a"),
        ("https://host/a?b=1&sig=abc&key=def", "https://host/a?b=1&sig=***&key=***"),
        ("ghp_0123456789abcdef0123", "***"),
        ("sk-proj-0123456789abcdef0123_x-y", "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("model.path=/scratch/me/tokenizer=1", "model.path=/scratch/me/tokenizer=1"),
        ("hf_hub", "hf_hub"),
        ("hf-internal-testing/tiny-random-Llama", "hf-internal-testing/tiny-random-Llama"),
        ("/data/sk_learn_with_a_long_name/a.jsonl", "/data/sk_learn_with_a_long_name/a.jsonl"),
        ("eval.max_new_tokens=128", "eval.max_new_tokens=128"),
        ("data.path=hf://datasets/org/rows@main/a", "data.path=hf://datasets/org/rows@main/a"),
    ],
)
def test_credentials_in_a_value(text: str, safe: str) -> None:
    assert without_secrets(text) == safe


def test_other_variables_stay_out() -> None:
    variables = {"SLURM_JOB_ID": "7", "LS_COLORS": "x", "PATH": "/bin", "SLURM_NODELIST": "n1"}
    assert safe_variables(variables) == {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "n1"}


def test_a_run_does_not_wait_for_hashes(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train()
    adapter = whole.adapter
    (tmp_path / "cache" / "file_hashes.json").unlink()
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "whole")

    def read_forever(hashes: FileHashes, file: Path) -> str:
        while not hashes._is_cancelled():
            pass
        raise receipt.Cancelled

    monkeypatch.setattr(FileHashes, "_read_through", read_forever)
    monkeypatch.setattr(receipt, "_WAIT_SECONDS", 0.2)
    run = train()
    [start] = starts(run)
    assert start["hashes"] == "not hashed: the run ended first"
    assert start["base"]["files"] == {}
    assert run.adapter == adapter


def test_a_thread_that_hangs_writes_nothing_after_the_run(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry that it would complete may be that of the next start."""
    hashing = {}
    goes_on = threading.Event()

    def hang(hashes: FileHashes, file: Path) -> str:
        hashing["thread"] = threading.current_thread()
        goes_on.wait(30)
        raise receipt.Cancelled

    monkeypatch.setattr(FileHashes, "_read_through", hang)
    monkeypatch.setattr(receipt, "_WAIT_SECONDS", 0.1)
    run = train()
    before = starts(run)
    goes_on.set()
    hashing["thread"].join(30)
    assert starts(run) == before
    assert before[0]["hashes"] == "not hashed: the run goes on, or was killed"


@pytest.mark.parametrize("content", ["", '{"not": "a list"}'])
def test_a_damaged_history_ends_no_run(content: str, train: Callable[..., Run]) -> None:
    run = train()
    (run.folder / "environment.json").write_text(content)
    train(num_steps=6)
    assert [start["step"] for start in starts(run)] == [4]


def test_a_file_that_cannot_be_read_ends_no_run(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hashes: FileHashes, file: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileHashes, "_read_through", fail)
    [start] = starts(train())
    assert start["base"]["files"]["config.json"] == {"error": "Input/output error"}


def test_the_image(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, sif = tmp_path / "image.json", tmp_path / "lora.sif"
    described.write_text('{"version": "0.1.0", "commit": "abc", "built": "2026-11-26T00:00:00Z"}')
    sif.write_bytes(b"squashfs")
    monkeypatch.setattr(receipt_machine, "_IMAGE_FILE", described)
    monkeypatch.setenv("APPTAINER_CONTAINER", str(sif))
    image = starts(train())[0]["image"]
    assert (image["commit"], image["file"]) == ("abc", str(sif))
    assert image["sha256"] == expected(described)["sha256"]
    assert image["sif"] == expected(sif)


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--org--tiny"
    snapshot = root / "snapshots" / COMMIT
    blobs = root / "blobs"
    for folder in (snapshot, blobs, root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (blobs / ("a" * 64)).write_bytes(b"weights")
    (blobs / ("b" * 40)).write_text('{"hidden_size": 8}')
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    (snapshot / "config.json").symlink_to(blobs / ("b" * 40))
    (snapshot / "README.md").touch()
    config = ModelConfig(path="org/tiny")
    folder = base_folder(config)
    assert base_commit(folder) == COMMIT
    assert model_config(folder) == {"hidden_size": 8}
    assert hash_base(config, FileHashes().of) == {
        "config.json": expected(blobs / ("b" * 40)),
        "model.safetensors": {"size": 7, "sha256": "a" * 64},
    }


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by its commit, and found again where another machine has its cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "datasets--org--rows"
    file = root / "snapshots" / COMMIT / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    notes = SplitNotes("org/rows", COMMIT, None, {"train": [file.name]}, {}, needs_card=False)
    notes.write(notes_file("org/rows", COMMIT, None))
    config = Config(model=ModelConfig(path="model"), data=DataConfig(path="org/rows"))
    sources = find_sources(config.data, seed=0)
    assert data_commit(sources) == COMMIT
    assert data_files(config, sources) == {"org/rows/train.jsonl": file}

    (tmp_path / "hub").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    moved = tmp_path / "elsewhere" / file.relative_to(tmp_path / "hub")
    pinned = DataConfig(path="org/rows", revision=COMMIT)
    assert recorded_files(pinned, ["org/rows/train.jsonl"]) == {"org/rows/train.jsonl": moved}
    moved.unlink()
    assert recorded_files(pinned, ["org/rows/train.jsonl"]) == {"org/rows/train.jsonl": None}


def test_only_the_weights_that_are_loaded(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_text(name)
    found = hash_base(ModelConfig(path=str(tmp_path)), FileHashes().of)
    assert list(found) == [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
