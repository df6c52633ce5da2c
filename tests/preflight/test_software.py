"""What Triton needs, and packages that another folder puts before the installed ones."""

from __future__ import annotations

import dataclasses
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from lora_train.preflight import driver
from lora_train.preflight.driver import check_toolchain
from lora_train.preflight.nvml import Gpu, GpuReport

GPUS = GpuReport((Gpu(0, "GPU-0", "NVIDIA A100", (8, 0), 0, 0),), "550.54.15", None, True)


@pytest.fixture
def gpu_machine(machine, built, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(built))
    return dataclasses.replace(machine, ask_gpus=lambda: GPUS)


def test_all_is_there(gpu_machine, configured):
    [finding] = check_toolchain(gpu_machine, configured())
    assert finding.level == "ok"


def test_nothing_is_needed_without_kernels(machine, gpu_machine, configured, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert check_toolchain(machine, configured()) == []
    assert check_toolchain(gpu_machine, configured("kernels.fused=off")) == []


def test_no_compiler(gpu_machine, configured, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [finding] = check_toolchain(gpu_machine, configured("kernels.fused=required"))
    assert (finding.level, finding.seen) == ("error", "no C compiler (gcc, clang)")
    # the model is not known to be one that the kernels take
    unknown = configured("model.path=org/unknown")
    assert [each.level for each in check_toolchain(gpu_machine, unknown)] == ["warning"]
    # compiled before
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "triton/KEY").mkdir(parents=True)
    (tmp_path / "triton/KEY/cuda_utils.of-another-python.so").touch()
    assert [each.level for each in check_toolchain(gpu_machine, unknown)] == ["warning"]
    (tmp_path / f"triton/KEY/cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert [each.level for each in check_toolchain(gpu_machine, unknown)] == ["ok"]


def test_dora_needs_no_compiler(gpu_machine, configured, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    words = (f"model.path={tmp_path / 'model'}",)
    assert [each.level for each in check_toolchain(gpu_machine, configured(*words))] == ["error"]
    dora = configured(*words, "peft.use_dora=true")
    assert [each.level for each in check_toolchain(gpu_machine, dora)] == ["warning"]


def test_a_cache_that_nothing_can_be_loaded_from(gpu_machine, configured, monkeypatch, mounted):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(mounted("noexec") / "triton"))
    [finding] = check_toolchain(gpu_machine, configured("kernels.fused=required"))
    assert finding.level == "error"
    assert finding.seen.endswith("is on a file system that is mounted noexec")
    assert finding.mend.startswith("export TRITON_CACHE_DIR=")


def test_no_headers(gpu_machine, configured, monkeypatch, tmp_path):
    monkeypatch.setattr(driver.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    [finding] = check_toolchain(gpu_machine, configured("kernels.fused=required"))
    assert (finding.level, finding.seen) == ("error", f"no {tmp_path}/Python.h")


def test_libcuda_where_triton_looks(gpu_machine, configured, monkeypatch, tmp_path, built):
    required = configured("kernels.fused=required")
    monkeypatch.delenv("LD_LIBRARY_PATH")
    # prints nothing, on a machine with a driver too
    monkeypatch.setattr(driver, "_LDCONFIG", "true")
    [finding] = check_toolchain(gpu_machine, required)
    assert finding.level == "error"
    assert "TRITON_LIBCUDA_PATH" in finding.mend
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert [each.level for each in check_toolchain(gpu_machine, required)] == ["error"]
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(built))
    assert [each.level for each in check_toolchain(gpu_machine, required)] == ["ok"]


def package(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    return folder / name


def imports(preflight, **environment):
    return [each for each in preflight(**environment) if each["check"] == "imports"]


def test_packages_from_python_path(preflight, tmp_path):
    package(tmp_path / "modules", "torch")
    [finding] = imports(preflight, PYTHONPATH=str(tmp_path / "modules"))
    assert (finding["level"], finding["mend"]) == ("error", "unset PYTHONPATH")
    assert finding["seen"] == f"torch would be imported from PYTHONPATH={tmp_path / 'modules'}"


def test_the_same_packages_from_python_path(preflight, tmp_path):
    folder = package(tmp_path / "modules", "torch")
    (folder / "version.py").write_text(f"__version__ = '{metadata.version('torch')}'\n")
    [finding] = imports(preflight, PYTHONPATH=str(tmp_path / "modules"))
    assert finding["level"] == "ok"


def test_the_current_folder_in_python_path(preflight, workplace):
    package(workplace, "kernels")
    [finding] = imports(preflight, PYTHONPATH="/nowhere:")
    assert finding["mend"].endswith("or unset PYTHONPATH")


def test_other_packages_from_python_path(preflight, tmp_path):
    package(tmp_path / "modules", "tokenizers")
    package(tmp_path / "modules", "unrelated")
    [finding] = imports(preflight, PYTHONPATH=str(tmp_path / "modules"))
    assert finding["level"] == "warning"
    assert finding["seen"].startswith("tokenizers would be imported from ")


def test_the_user_site(preflight, tmp_path, monkeypatch):
    # a virtual environment has none; PYTHONPATH stands in for the line that site.py would add
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "local"))
    folder = tmp_path / "local/lib/python3.11/site-packages"
    package(folder, "transformers")
    [finding] = imports(preflight, PYTHONPATH=str(folder))
    assert (finding["level"], finding["mend"]) == ("error", "export PYTHONNOUSERSITE=1")


def test_a_folder_named_kernels(preflight, tmp_path):
    folder = package(tmp_path / "code", "kernels")
    [finding] = imports(preflight, PYTHONPATH=str(tmp_path / "code"))
    assert finding["level"] == "warning"
    assert finding["seen"] == f"`import kernels` finds {folder}"
    for version, level in (("0.18.1", "warning"), ("0.18.2", "error"), ("0.19", "warning")):
        (folder / "__init__.py").write_text(f'__version__ = "{version}"\n')
        [finding] = imports(preflight, PYTHONPATH=str(tmp_path / "code"))
        assert finding["level"] == level, version
    # without a file in it transformers does not see it
    (folder / "__init__.py").unlink()
    assert [each["level"] for each in imports(preflight, PYTHONPATH=str(tmp_path / "code"))] == [
        "ok"
    ]
