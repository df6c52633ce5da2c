import os

import pytest
import torch

from lora_train import device
from lora_train.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def gpu(monkeypatch, name, capability, count=1):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_old_gpu_is_refused_bf16_and_told_what_to_ask_for(monkeypatch):
    gpu(monkeypatch, "Tesla V100-SXM2-32GB", (7, 0))
    with pytest.raises(UserError) as error:
        device.select_precision("bf16", GPU)
    assert str(error.value) == (
        "trainer.precision=bf16, but Tesla V100-SXM2-32GB (compute capability 7.0) has no bf16 "
        "units; those came with 8.0 (A100)\nhint: ask Slurm for a newer GPU, such as "
        "--gres=gpu:a100:1 or --constraint=a100 (`sinfo -o '%G %f'` lists what there is), or set "
        "trainer.precision=fp32"
    )
    choice = device.select_precision("auto", GPU)
    assert choice.dtype == torch.float32
    assert "Tesla V100-SXM2-32GB (compute capability 7.0) has no bf16 units" in choice.reason


def test_new_gpu(monkeypatch):
    gpu(monkeypatch, "NVIDIA A100", (8, 0))
    choice = device.select_precision("auto", GPU)
    assert (choice.dtype, choice.reason) == (torch.bfloat16, "bf16: NVIDIA A100 has bf16 units")
    assert device.select_precision("fp32", GPU).dtype == torch.float32


@pytest.mark.parametrize(
    ("feature", "dtype", "reason"),
    [
        ("amx_bf16", torch.bfloat16, "bf16: this CPU has amx_bf16"),
        (None, torch.float32, "fp32: this CPU has neither avx512_bf16 nor amx_bf16"),
    ],
)
def test_cpu(monkeypatch, feature, dtype, reason):
    monkeypatch.setattr(device, "_native_bf16_feature", lambda: feature)
    assert device.select_precision("auto", CPU) == device.PrecisionChoice(dtype, reason)
    assert device.select_precision("bf16", CPU).dtype == torch.bfloat16


def test_cpu_feature_is_the_kernels_own():
    if not os.path.exists("/proc/cpuinfo"):
        pytest.skip("needs /proc/cpuinfo")
    with open("/proc/cpuinfo") as file:
        flags = set(next((line for line in file if line.startswith("flags")), "").split())
    expected = bool({"avx512_bf16", "amx_bf16"} & flags)
    assert (device._native_bf16_feature() is not None) == expected


def test_gpu_of_a_process(monkeypatch):
    gpu(monkeypatch, "NVIDIA A100", (8, 0), count=4)
    assert device.select_device(3) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="process 4 of this node has no GPU: 4 are visible"):
        device.select_device(4)
    # Slurm's --gpus-per-task: each process sees its own GPU as number 0
    gpu(monkeypatch, "NVIDIA A100", (8, 0), count=1)
    assert device.select_device(3) == torch.device("cuda", 0)


@pytest.fixture
def no_cuda(monkeypatch, tmp_path):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(device, "_NVIDIA_DEVICE", tmp_path / "nvidia0")
    return tmp_path / "nvidia0"


TO_THE_CPU = "; to use the CPU, set ACCELERATE_USE_CPU=true"


def test_cpu_build_on_a_gpu_node_is_refused(monkeypatch, no_cuda):
    assert device.select_device() == CPU
    no_cuda.touch()
    with pytest.raises(UserError) as error:
        device.select_device()
    assert str(error.value) == (
        f"there is a GPU ({no_cuda}), but torch 2.13.0+cpu is built for the CPU\n"
        "hint: make setup TORCH_CUDA=cu126 (login nodes have no driver, so the automatic choice "
        f"there is the CPU build){TO_THE_CPU}"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    assert device.select_device() == CPU


def test_cuda_build_without_a_driver_is_refused(monkeypatch, no_cuda):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu126")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError) as error:
        device.select_device()
    assert error.value.message == (
        "there is a GPU (CUDA_VISIBLE_DEVICES=0), but torch 2.13.0+cu126 (CUDA 12.6) finds none"
    )
    assert error.value.hint.startswith("start the container with --nv (docker: --gpus all), ask ")
    assert error.value.hint.endswith(TO_THE_CPU)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("CUDA_VISIBLE_DEVICES", "-1", False),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles", False),
        ("SLURM_JOB_GPUS", "0", True),
        ("SLURM_JOB_GPUS", "", False),
        ("SLURM_GPUS_ON_NODE", "2", True),
        ("SLURM_GPUS_ON_NODE", "0", False),
    ],
)
def test_signs_of_a_gpu(monkeypatch, no_cuda, name, value, refused):
    monkeypatch.setenv(name, value)
    assert device._sign_of_gpu() == (f"{name}={value}" if refused else None)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_control_group(monkeypatch, tmp_path, files, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    assert device._cgroup_cores() == cores


def test_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(device, "_cgroup_cores", lambda: 16)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert device.usable_cores() == 8
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    device.set_cpu_threads()
    device.set_cpu_threads(processes_per_node=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    device.set_cpu_threads()
    assert asked == [8, 2]
