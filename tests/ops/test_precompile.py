"""Kernels compiled ahead of time are the ones that a run finds, through a copy of small files."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_train import kernel_cache, precompile
from lora_train.errors import UserError
from lora_train.known_models import MODELS

CAPABILITY = 90
CASES = """
from lora_train.config_loading import resolve
DIMENSIONS = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5,
}
cases = [(resolve(factory="quickstart", overrides={"peft.dim": "8"}), DIMENSIONS)]
"""
FILL = """
import sys
from pathlib import Path
from lora_train.precompile import precompile
count = precompile(Path(sys.argv[1]), cases)
print(count.cached, count.compiled)
"""
# a run that finds no compiler: what it does not find in the cache, it does not get
LOOK_UP = """
import json
from pathlib import Path
from unittest import mock
from triton.backends.nvidia.driver import CudaUtils
from triton.runtime import build
from lora_kernels import launch
from lora_train.precompile import compile_cases

counts = [compile_cases(90, cases)]
table = launch._table("sm_90")
table["attention_forward"][0]["config"]["num_warps"] //= 2
counts.append(compile_cases(90, cases))
load = mock.Mock()
with mock.patch.object(build, "_load_module_from_path", load):
    CudaUtils()
print(json.dumps([[[count.cached, count.compiled] for count in counts], load.call_args.args[1]]))
"""


def _python(code: str, *arguments: str, **environment: str) -> str:
    # the interpreter's kernels are Python functions
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CASES + code, *arguments],
        env={**inherited, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a tiny model's kernels, and how many there are."""
    folder = tmp_path_factory.mktemp("filled")
    cached, compiled = map(int, _python(FILL, str(folder)).split())
    assert cached == 0
    return folder, compiled


@pytest.fixture(scope="module")
def copied(filled: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a node copies of it: all but the kernels themselves."""
    folder, _ = filled
    copy = tmp_path_factory.mktemp("copied")
    for pattern in ("*/__grp__*.json", "*/*.so"):
        for path in folder.glob(pattern):
            target = copy / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    return copy


@pytest.fixture(scope="module")
def looked_up(copied: Path) -> list[Any]:
    """Counts of a run, of one with another launch table, and where Triton's module was."""
    printed = _python(
        LOOK_UP, TRITON_CACHE_DIR=str(copied), CC="/bin/false", TRITON_LIBCUDA_PATH="/nowhere"
    )
    return json.loads(printed)


@pytest.mark.slow
def test_a_run_finds_every_kernel(filled: tuple[Path, int], looked_up: list[Any]) -> None:
    (cached, compiled), _ = looked_up[0]
    assert compiled == 0
    # of two kinds of GPUs
    assert 0 < cached < filled[1]


@pytest.mark.slow
def test_another_launch_table_is_another_kernel(looked_up: list[Any]) -> None:
    assert looked_up[0][1] == [0, 1]


@pytest.mark.slow
def test_the_folder_holds_what_is_launched_and_no_more(filled: tuple[Path, int]) -> None:
    folder, compiled = filled
    groups = list(folder.glob("*/__grp__*.json"))
    assert len(groups) == compiled
    for group in groups:
        children = json.loads(group.read_text())["child_paths"]
        assert {Path(name).suffix for name in children} == {".cubin", ".json"}
        assert all(Path(path).parent == group.parent for path in children.values())
        assert {path.name for path in group.parent.iterdir()} == {*children, group.name}


@pytest.mark.slow
def test_the_drivers_module_is_found_and_wants_the_real_library(
    copied: Path, looked_up: list[Any]
) -> None:
    module = Path(looked_up[1])
    assert copied in module.parents
    if torch.cuda.is_available():
        ctypes.CDLL(str(module))
    else:
        with pytest.raises(OSError, match=r"libcuda\.so\.1: cannot open"):
            ctypes.CDLL(str(module))


def test_every_recipe_has_its_models_dimensions() -> None:
    configs = list(precompile.recipe_configs())
    assert {config.model.path for config in configs} == set(MODELS)
    assert {8, 16} <= {config.peft.dim for config in configs}


@pytest.mark.parametrize(
    ("variable", "value"), [("TRITON_INTERPRET", "1"), ("TRITON_DISABLE_LINE_INFO", "1")]
)
def test_an_environment_that_no_run_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    from triton import knobs

    monkeypatch.setenv(variable, value)
    # set for the process: Triton may have been told otherwise than by its variable
    monkeypatch.setattr(knobs.runtime, "interpret", variable == "TRITON_INTERPRET")
    with pytest.raises(UserError, match=variable):
        precompile.precompile(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_the_count_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from triton import knobs

    caplog.set_level("INFO")
    kernel_cache.log_count()
    kernel_cache.start_counting()
    listener = knobs.compilation.listener
    times = SimpleNamespace(total=1_500_000)
    for cache_hit in (True, True, False):
        listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)
    kernel_cache.log_count()
    kernel_cache.log_count()
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: 2 from the cache, 1 compiled in 1.5 s"
    ]
    assert knobs.compilation.listener is None
