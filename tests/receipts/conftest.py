"""A tiny model with data, and runs of it that are made within the test's own process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Run, make_assets

from lora_train import exit_status
from lora_train.cli import main
from lora_train.receipts import file_hashes
from lora_train.replay.child_run import ChildEnd


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    # files made by a test are a moment old
    monkeypatch.setattr(file_hashes, "_SETTLED_NANOSECONDS", -(10**10))
    # other processes share the cores, and these tensors are tiny
    monkeypatch.setattr("lora_train.assembly.set_cpu_threads", lambda *_, **__: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(assets: Path, tmp_path: Path) -> Callable[..., Run]:
    """Make a run, with dropout and a checkpoint in its middle, in this process."""

    def make(*changes: str, num_steps: int = 4) -> Run:
        run = Run(assets, tmp_path, num_steps, changes=("peft.dropout=0.1", *changes))
        assert _run_here(run.words).status == 0
        return run

    return make


@pytest.fixture
def run_here() -> Callable[..., ChildEnd]:
    """Stands in for `run_child`: the same program, without the seconds that a process costs."""
    return _run_here


def _run_here(
    words: Sequence[str],
    *,
    should_end: Callable[[], bool] | None = None,
    log_file: Path | None = None,
) -> ChildEnd:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    done, was_ended = threading.Event(), threading.Event()

    def watch() -> None:
        while should_end is not None and not done.is_set():
            if should_end():
                was_ended.set()
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    with contextlib.ExitStack() as stack:
        if log_file is not None:
            output = stack.enter_context(log_file.open("a"))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
        before = signal.getsignal(signal.SIGTERM)
        thread.start()
        try:
            status = main(list(words))
            # one that comes too late must not end the tests
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except KeyboardInterrupt:
            status = exit_status.STOPPED
        done.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    return ChildEnd(status, was_ended.is_set(), None)


@pytest.fixture
def edit_receipt() -> Callable[[Run, Callable[[dict[str, Any]], None]], None]:
    """Change each entry of a run's environment.json."""
    return _edit_receipt


def _edit_receipt(run: Run, edit: Callable[[dict[str, Any]], None]) -> None:
    file = run.folder / "environment.json"
    starts = json.loads(file.read_text())
    for start in starts:
        edit(start)
    file.write_text(json.dumps(starts))
