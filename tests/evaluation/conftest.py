"""A tiny run: a random Llama of bytes that has learned to tell words that end in `a` or `b`."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_assets
from transformers import AutoConfig, AutoModelForCausalLM

from lora_train.cli import parse_command_line
from lora_train.commands import evaluate
from lora_train.config_loading import resolve
from lora_train.run import run


@pytest.fixture(autouse=True)
def _one_thread():
    # other processes share the cores, and these tensors are tiny
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choices("abcd", k=rng.randint(2, 9)))
        rows.append({"prompt": word, "completion": "yes" if word[-1] in "ab" else "no"})
    return rows


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    # with a head of its own, and a large one: a random one that is tied learns next to nothing
    config = AutoConfig.from_pretrained(folder / "model")
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", make_rows(96, seed=0))
    write_rows(data / "validation.jsonl", make_rows(12, seed=1))
    return folder


def train(assets: Path, folder: Path, cache: Path, *changes: str) -> Path:
    """Train a tiny run and return its directory."""
    words = [
        f"model.path={assets / 'model'}",
        f"data.path={assets / 'data'}",
        f"log.log_dir={folder}",
        "log.name=tiny",
        "log.trackers=[]",
        "data.seq_length=64",
        "data.global_batch_size=4",
        "data.micro_batch_size=2",
        "optim.lr=1e-2",
        "trainer.precision=fp32",
        "trainer.max_steps=16",
        "trainer.val_check_interval=16",
        "log.ckpt.every_n_train_steps=8",
        "eval.num_generate=0",
        "eval.max_new_tokens=6",
        "eval.batch_size=5",
    ]
    keys = [change.split("=")[0] for change in changes]
    words = [*(word for word in words if word.split("=")[0] not in keys), *changes]
    config = resolve(overrides=parse_command_line(words).overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE_DIR", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert run(config, ["lora-train", *words]) == 0
        torch.set_num_threads(threads)
    return folder / "tiny"


@pytest.fixture(scope="session")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory; use `run_folder`, which is a copy."""
    folder = tmp_path_factory.mktemp("runs")
    return train(assets, folder, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def train_other(assets: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains another run, with some settings changed."""
    return functools.partial(train, assets, tmp_path, tmp_path / "cache")


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


@pytest.fixture
def more_rows(tmp_path: Path, assets: Path) -> Path:
    """Rows of other lengths than the run's, the first two of them from its training data."""
    known = (assets / "data" / "train.jsonl").read_text().splitlines()[:2]
    rows = [{"prompt": f"{'bcd' * n}a", "completion": "yes"} for n in range(3, 7)]
    rows += [{"prompt": f"{'bcd' * n}", "completion": "no"} for n in range(3, 7)]
    file = tmp_path / "more.jsonl"
    file.write_text("".join(line + "\n" for line in [*known, *map(json.dumps, rows)]))
    return file


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs `lora-train eval` in this process; returns the figures that it prints as JSON."""

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert evaluate.run([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call
