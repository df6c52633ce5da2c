"""GPU, container and driver on simulated machines, and through a stand-in for the driver."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from lora_train.preflight import driver
from lora_train.preflight.driver import TorchBuild, check_driver
from lora_train.preflight.gpu import check_container, check_gpu
from lora_train.preflight.nvml import Gpu, GpuReport, visible_gpus
from lora_train.preflight.runner import run_checks as run_every_check

A100 = Gpu(0, "GPU-aaaa", "NVIDIA A100", (8, 0), 80 * 2**30, 0)
OTHER = Gpu(1, "GPU-bbbb", "NVIDIA A100", (8, 0), 80 * 2**30, 0)
PART = Gpu(2, "MIG-cccc", "NVIDIA A100 MIG 1g.10gb", (8, 0), 10 * 2**30, 0, True, "GPU-cccc")
CUDA_12, CUDA_13 = TorchBuild("2.13.0+cu126", (12, 6)), TorchBuild("2.13.0+cu130", (13, 0))


def with_gpus(
    machine, *gpus, driver="550.54.15", has_libcuda=True, problem=None, cuda=None, **changes
):
    report = GpuReport(gpus, driver, problem, has_libcuda, cuda)
    return dataclasses.replace(machine, ask_gpus=lambda: report, **changes)


def run_checks(machine, config, name):
    return [each for each in run_every_check(machine, config) if each.check == name]


def levels(findings):
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [A100, OTHER, PART]),
        ("1,0", [OTHER, A100]),
        ("GPU-bb", [OTHER]),
        ("MIG-cccc", [PART]),
        ("MIG-GPU-cccc/1/0", [PART]),
        ("0,7,1", [A100]),
        ("NoDevFiles", []),
        ("GPU-", []),
    ],
)
def test_the_gpus_of_a_process(monkeypatch, text, expected):
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert visible_gpus([A100, OTHER, PART]) == expected


def test_the_order_of_the_gpus_is_cudas(machine, configured, monkeypatch):
    display = dataclasses.replace(A100, uuid="GPU-dddd", capability=(7, 5))
    assert visible_gpus([display, OTHER]) == [OTHER, display]
    assert levels(check_gpu(with_gpus(machine, display, OTHER), configured())) == ["ok"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus([display, OTHER]) == [display]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert visible_gpus([display, OTHER]) == [OTHER]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus([display, OTHER]) == [display, OTHER]


def test_a_divided_gpu_beside_others_is_not_used():
    divided = dataclasses.replace(A100, is_divided=True)
    assert visible_gpus([divided, OTHER]) == [OTHER]
    assert visible_gpus([divided]) == [divided]


def test_an_old_gpu_is_refused_unless_asked_for(machine, configured):
    old = with_gpus(machine, dataclasses.replace(A100, name="Tesla V100", capability=(7, 0)))
    [finding] = check_gpu(old, configured())
    assert finding.level == "error"
    assert finding.seen == "Tesla V100 (GPU 0) has compute capability 7.0"
    assert "#SBATCH --gres=gpu:a100:1" in finding.mend
    assert "sinfo -o '%G %f'" in finding.mend
    slowly = configured("trainer.precision=fp32", "kernels.fused=off")
    assert levels(check_gpu(old, slowly)) == ["warning"]


def test_only_the_gpus_that_will_be_used_are_judged(machine, configured, monkeypatch):
    busy = dataclasses.replace(OTHER, used=3 * 2**30)
    both = with_gpus(machine, A100, busy)
    _, idle = check_gpu(both, configured("data.global_batch_size=3"))
    assert (idle.level, idle.seen) == ("warning", "1 of 2 GPUs stay idle")
    assert idle.mend == "data.global_batch_size=4, or #SBATCH --gpus-per-node=1"
    assert levels(check_gpu(both, configured("trainer.devices=1"))) == ["ok"]
    # those that are too old, and parts of one, would be of no use
    old = dataclasses.replace(busy, capability=(7, 5))
    assert levels(check_gpu(with_gpus(machine, A100, old, PART), configured())) == ["ok"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    [finding] = check_gpu(both, configured())
    assert finding.level == "warning"
    assert "3.0 GiB of 80.0 GiB are in use already" in finding.seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert levels(check_gpu(both, configured())) == ["ok", "warning"]


def test_no_gpu(machine, configured, monkeypatch):
    large, small = configured("--factory", "llama31_8b"), configured()
    assert levels(check_gpu(machine, small)) == ["ok"]
    [finding] = check_gpu(machine, large)
    assert (finding.level, finding.seen) == ("error", "no GPU, and the model has 8.0 B parameters")
    assert "#SBATCH --gpus=1" in finding.mend
    # `lora-train preflight` on a login node, and in a job
    command = dataclasses.replace(machine, run_follows=False)
    assert levels(run_checks(command, large, "gpu")) == ["skipped"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert levels(run_checks(command, large, "gpu")) == ["error"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert levels(check_gpu(machine, large)) == ["ok"]
    assert levels(check_gpu(machine, configured("kernels.fused=required"))) == ["error"]


def test_a_gpu_that_nvml_does_not_see(machine, configured, monkeypatch):
    """WSL, a container without the utility capability: CUDA works, NVML does not."""
    unseen = with_gpus(machine, driver=None, problem="NVML: Shared Library Not Found")
    assert levels(check_gpu(unseen, configured())) == ["ok"]
    for words in (("--factory", "llama31_8b"), ("kernels.fused=required",)):
        [finding] = check_gpu(unseen, configured(*words))
        assert finding.level == "warning"
        assert "could not be judged: NVML: Shared Library Not Found" in finding.seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert levels(check_gpu(unseen, configured("kernels.fused=required"))) == ["error"]


@pytest.mark.parametrize("variable", ["SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", None])
def test_a_gpu_that_cannot_be_used(machine, root, configured, monkeypatch, variable):
    if variable is None:
        (root / "dev").mkdir()
        (root / "dev/nvidia0").touch()
    else:
        monkeypatch.setenv(variable, "1")
    broken = with_gpus(machine, driver=None, has_libcuda=False, problem="NVML: Driver Not Loaded")
    [finding] = check_gpu(broken, configured())
    assert finding.level == "error"
    assert f"({variable}=1)" in finding.seen if variable else "dev/nvidia0" in finding.seen
    assert "Driver Not Loaded" in finding.seen
    # CUDA may work where NVML alone is missing
    unknown = with_gpus(machine, driver=None, problem="NVML: Shared Library Not Found")
    assert levels(check_gpu(unknown, configured())) == ["warning"]


def test_apptainer_without_nv(machine, root, configured, monkeypatch):
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/lora.sif")
    (root / "dev").mkdir()
    machine = dataclasses.replace(machine, words=("--factory", "llama31_8b", "data.path=a b"))
    # a node without a GPU
    assert levels(check_container(machine, configured())) == ["ok"]
    (root / "dev/nvidia0").touch()
    [finding] = check_container(machine, configured())
    assert finding.level == "error"
    assert finding.mend == (
        "singularity run --nv /images/lora.sif --factory llama31_8b 'data.path=a b'"
    )
    assert check_gpu(machine, configured("--factory", "llama31_8b")) == []  # said once
    assert levels(check_container(with_gpus(machine, A100), configured())) == ["ok"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert levels(check_container(machine, configured())) == ["ok"]


def test_the_images_entrypoint_was_passed_by(machine, root, configured, monkeypatch, tmp_path):
    (root / "opt/lora").mkdir(parents=True)
    (root / "opt/lora/image.json").write_text("{}")
    (root / ".dockerenv").touch()
    machine = dataclasses.replace(machine, words=("log.name=my run",))
    [finding] = check_container(machine, configured())
    assert finding.level == "warning"
    assert finding.mend == "/opt/lora/bin/lora-train 'log.name=my run'"
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    assert levels(check_container(machine, configured())) == ["ok"]


def test_docker_without_gpus(machine, root, configured):
    (root / ".dockerenv").touch()
    assert levels(check_container(machine, configured())) == ["ok"]
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").touch()
    [finding] = check_container(machine, configured())
    assert finding.level == "warning"  # perhaps the user wants none of it
    assert "docker run --gpus all" in finding.mend
    for words in (("--factory", "llama31_8b"), ("kernels.fused=required",)):
        assert levels(check_container(machine, configured(*words))) == ["error"]
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    assert levels(check_container(machine, configured())) == ["error"]


@pytest.mark.parametrize(
    ("version", "build", "level", "words"),
    [
        ("550.54.15", CUDA_12, "ok", "550.54.15 runs torch 2.13.0+cu126"),
        ("525.60", CUDA_12, "ok", ""),
        ("470.57.02", CUDA_12, "error", "CUDA 12 needs driver 525 or newer"),
        ("550.54.15", CUDA_13, "error", "make setup TORCH_CUDA=cu126"),
        ("580.65.06", CUDA_13, "ok", ""),
        ("550.54.15", TorchBuild("2.13.0+cpu", None), "error", "make setup TORCH_CUDA=cu126"),
    ],
)
def test_driver(machine, configured, monkeypatch, version, build, level, words):
    monkeypatch.setattr(driver, "torch_build", lambda: build)
    [finding] = check_driver(with_gpus(machine, A100, driver=version), configured())
    assert finding.level == level
    assert words in f"{finding.seen} {finding.why} {finding.mend}"


def test_the_image_is_built_anew(machine, root, configured, monkeypatch):
    monkeypatch.setattr(driver, "torch_build", lambda: CUDA_13)
    (root / "opt/lora").mkdir(parents=True)
    (root / "opt/lora/image.json").touch()
    [finding] = check_driver(with_gpus(machine, A100), configured())
    assert finding.mend == "an image that was built with `make sif TORCH_CUDA=cu126`"


def test_driver_version_without_nvml(machine, root, configured, monkeypatch):
    monkeypatch.setattr(driver, "torch_build", lambda: CUDA_12)
    assert check_driver(machine, configured()) == []
    (root / "proc/driver/nvidia").mkdir(parents=True)
    version = root / "proc/driver/nvidia/version"
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.57.02  Release Build",
    ):
        version.write_text(f"{line}\nGCC version: 12\n")
        [finding] = check_driver(machine, configured())
        assert (finding.level, finding.seen[:16]) == ("error", "driver 470.57.02")


@pytest.mark.parametrize(
    ("version", "cuda", "level", "words"),
    [
        ("550.54.15", (13, 0), "ok", ""),
        ("550.54.15", (12, 4), "error", "make setup TORCH_CUDA=cu126"),
        ("470.57.02", (11, 4), "error", "ask for a node with driver 580"),
        # the compat library is older than the driver
        ("580.65.06", (12, 6), "error", "out of LD_LIBRARY_PATH"),
        # WSL: NVML says nothing
        (None, (12, 6), "error", "driver of unknown version with a libcuda.so.1 for CUDA 12.6"),
    ],
)
def test_the_loaded_library_decides(machine, configured, monkeypatch, version, cuda, level, words):
    monkeypatch.setattr(driver, "torch_build", lambda: CUDA_13)
    [finding] = check_driver(with_gpus(machine, A100, driver=version, cuda=cuda), configured())
    assert finding.level == level
    assert words in f"{finding.seen} {finding.mend}"


def test_what_the_loaded_library_says(built, tmp_path):
    """Asked as a real one is, without cuInit; an old one may not know the question."""
    source = "int cuDriverGetVersion(int *version) { *version = 12040; return 0; }"
    code = "from lora_train.preflight.nvml import loaded_cuda; print(loaded_cuda())"
    for text, expected in ((source, "(12, 4)"), ("", "None")):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"]
        subprocess.run(command, input=text, text=True, check=True)
        said = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert said.strip() == expected


def test_a_cpu_build_is_named_on_a_login_node(machine, configured, monkeypatch):
    monkeypatch.setattr(driver, "torch_build", lambda: TorchBuild("2.13.0+cpu", None))
    command = dataclasses.replace(machine, run_follows=False)
    large = configured("--factory", "llama31_8b")
    [finding] = check_driver(command, large)
    assert (finding.level, finding.mend) == ("warning", "make setup TORCH_CUDA=cu126")
    assert check_driver(command, configured()) == []
    assert check_driver(machine, large) == []


def test_a_new_gpu_and_an_old_cuda(machine, configured, monkeypatch):
    monkeypatch.setattr(driver, "torch_build", lambda: CUDA_12)
    new = dataclasses.replace(A100, name="NVIDIA B200", capability=(10, 0))
    [finding] = check_driver(with_gpus(machine, new, driver="580.65.06"), configured())
    assert (finding.level, finding.mend) == ("error", "make setup TORCH_CUDA=cu130")


def test_torch_is_read_without_importing_it():
    import torch

    build = driver.torch_build()
    assert build.version == torch.__version__
    found = torch.version.cuda
    assert build.cuda == (None if found is None else tuple(map(int, found.split(".")[:2])))


def the(found, check):
    return [each for each in found if each["check"] == check]


def test_through_nvml(built, preflight):
    libraries = {"LD_LIBRARY_PATH": str(built), "SLURM_JOB_ID": "7"}
    [old] = the(preflight(FAKE_GPUS="7.0,0,-1", **libraries), "gpu")
    assert old["seen"] == "Tesla V100 (GPU 0) has compute capability 7.0"
    [busy] = the(preflight(FAKE_GPUS="8.0,5,-1", **libraries), "gpu")
    assert busy["seen"] == "NVIDIA A100 (GPU 0): 5.0 GiB of 80.0 GiB are in use already"
    found = preflight(FAKE_GPUS="7.0,0,-1 8.0,0,2", CUDA_VISIBLE_DEVICES="MIG-00000001-0001",
                      **libraries)  # fmt: skip
    [instance] = the(found, "gpu")
    assert instance["level"] == "ok"
    assert instance["seen"] == "NVIDIA A100 MIG 1g.10gb (part of GPU 1), 10.0 GiB"
    [divided] = the(preflight(FAKE_GPUS="8.0,0,0", **libraries), "gpu")
    assert divided["level"] == "error"
    assert "in MIG mode, and this job has no instance of it" in divided["seen"]
    [unloaded] = the(preflight(FAKE_NVML_INIT="9", SLURM_JOB_GPUS="0", **libraries), "gpu")
    assert "Driver Not Loaded" in unloaded["seen"]


def test_a_driver_that_hangs_is_not_waited_for(built, preflight):
    found = preflight(FAKE_NVML_HANGS="1", SLURM_JOB_GPUS="0", LD_LIBRARY_PATH=str(built))
    [finding] = the(found, "gpu")
    assert finding["level"] == "warning"
    assert finding["seen"].endswith("the driver did not answer within 3 s")
