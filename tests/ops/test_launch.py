from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import launch

GPU = torch.device("cuda", 0)
SMALL, LARGE = {"BLOCK_M": 1, "num_warps": 1}, {"BLOCK_M": 2, "num_warps": 8}
TABLE = [{"max_width": 512, "config": SMALL}, {"max_width": None, "config": LARGE}]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    launch._table.cache_clear()
    launch._table_of_gpu.cache_clear()
    yield
    launch._table.cache_clear()
    launch._table_of_gpu.cache_clear()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of tables, which differ in the width that ends the first entry."""
    for name, width in (("sm_80", 512), ("sm_90", 1024)):
        (tmp_path / name).mkdir()
        entries = [{**TABLE[0], "max_width": width}, TABLE[1]]
        (tmp_path / name / "one.json").write_text(json.dumps({"first": entries}))
        (tmp_path / name / "two.json").write_text(json.dumps({"second": entries[1:]}))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Capabilities of the GPUs that there seem to be."""
    capabilities = {0: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return capabilities


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("width", "expected"), [(0, SMALL), (512, SMALL), (513, LARGE), (10**9, LARGE)]
)
def test_first_entry_that_reaches_the_width(width: int, expected: dict[str, Any]) -> None:
    assert launch.launch_config("first", torch.device("cpu"), width) == expected


@pytest.mark.usefixtures("tables")
def test_config_is_the_callers_own() -> None:
    device = torch.device("cpu")
    launch.launch_config("first", device, 1)["BLOCK_M"] = 99
    assert launch.launch_config("first", device, 1) == SMALL
    assert launch.launch_config("second", device, 1) == LARGE


def test_no_entry_is_wide_enough(tables: Path) -> None:
    (tables / "sm_80" / "one.json").write_text(json.dumps({"first": TABLE[:1]}))
    with pytest.raises(LookupError, match="no entry for first of width 513"):
        launch.launch_config("first", torch.device("cpu"), 513)


@pytest.mark.usefixtures("tables", "gpu")
@pytest.mark.parametrize("device", [GPU, torch.device("cuda")])
def test_table_of_the_gpu(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    assert launch.launch_config("first", device, 513) == SMALL
    assert launch.launch_config("first", torch.device("cpu"), 513) == LARGE
    assert not caplog.records


@pytest.mark.usefixtures("tables")
def test_unknown_gpu_is_named_once(
    gpu: dict[int, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    gpu[1] = (12, 1)
    with caplog.at_level(logging.WARNING, logger="lora_kernels.launch"):
        for _ in range(2):
            assert launch.launch_config("first", torch.device("cuda", 1), 513) == LARGE
    (message,) = caplog.messages
    assert "GPU 1 (sm_121)" in message
    assert message.endswith("of sm_80")


def test_every_gpu_has_every_table() -> None:
    kernels = {
        folder.name: {
            path.name: list(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))
        }
        for folder in launch.TABLES.iterdir()
    }
    assert kernels.keys() >= {"sm_80", "sm_90"}
    for of_gpu in kernels.values():
        assert of_gpu == kernels["sm_80"]
        names = [name for of_file in of_gpu.values() for name in of_file]
        # files are merged
        assert len(names) == len(set(names))


@pytest.mark.parametrize("path", sorted(launch.TABLES.glob("*/*.json")), ids=str)
def test_shipped_tables(path: Path) -> None:
    for kernel, entries in json.loads(path.read_text(), object_pairs_hook=_distinct).items():
        *widths, last = [entry["max_width"] for entry in entries]
        assert last is None, kernel
        assert all(isinstance(width, int) for width in widths), kernel
        assert widths == sorted(set(widths)), kernel
        for entry in entries:
            assert entry.keys() == {"max_width", "config"}, kernel
            # some name a choice, the others what a launch takes
            if not all(isinstance(value, str) for value in entry["config"].values()):
                assert entry["config"].keys() >= {"num_warps", "num_stages"}, kernel


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), keys
    return dict(pairs)
