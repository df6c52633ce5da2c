"""The SIF from Singularity.def, run by a user who is not root, as on a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import REPOSITORY, USER, Sif, engine_environment

pytestmark = pytest.mark.slow

SHORT = ("--max-steps", "2", "eval.num_generate=0", "trainer.limit_val_batches=1")
HOME = Path(f"/home/{USER}")


@pytest.fixture
def unwritable_home() -> Iterator[None]:
    """The user's home is full or read-only: nothing can be written there."""
    os.chown(HOME, 0, 0)
    HOME.chmod(0o555)
    yield
    subprocess.run(["chown", USER, str(HOME)], check=True)
    HOME.chmod(0o755)


def summary(work: Path, name: str = "quickstart") -> dict:
    return json.loads((work / f"runs/{name}/summary.json").read_text())


def test_the_first_line_of_the_readme(sif: Sif, unwritable_home: None) -> None:
    work = sif.work_folder("first line")
    result = sif.run("--max-steps", "20", work=work)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "caches in" in result.stderr and "exit status 0" in result.stderr
    assert "gpu monitor: no NVIDIA GPU here" in result.stderr
    assert summary(work)["steps"] == 20
    assert summary(work)["last_loss"] < summary(work)["first_loss"]
    assert (work / "runs/quickstart/adapter/adapter_model.safetensors").exists()
    assert list(HOME.glob("**/.cache")) == []


def test_containall(sif: Sif, unwritable_home: None) -> None:
    """Nothing of the host but what is bound."""
    work = sif.work_folder("contained")
    verb = ("run", "--nv", "--containall", "--bind", str(work), "--pwd", str(work))
    result = sif.run(*SHORT, work=work, verb=verb)
    assert result.returncode == 0, result.stderr[-4000:]
    assert summary(work)["steps"] == 2


def test_containall_alone_trains_in_memory_and_says_so(sif: Sif, unwritable_home: None) -> None:
    work = sif.work_folder("contained alone")
    result = sif.run(*SHORT, work=work, verb=("run", "--nv", "--containall"))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "--bind" in result.stderr
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "words"), [(("exec", "--nv"), ("lora-train",)), (("run", "--nv"), ("train",))]
)
def test_every_door_is_the_same_run(sif: Sif, verb: tuple[str, ...], words: tuple[str]) -> None:
    work = sif.work_folder(f"door {verb[0]}")
    result = sif.run(*words, *SHORT, work=work, verb=verb)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "caches in" in result.stderr and "exit status 0" in result.stderr
    assert summary(work)["steps"] == 2


def test_traps_of_the_users_folder(sif: Sif) -> None:
    """Folders named like packages, another Python's path, a compiler that is not here, no HOME."""
    work = sif.work_folder("traps")
    for package in ("kernels", "lora_train", "torch"):
        (work / package).mkdir()
        (work / package / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    environment = {
        "PYTHONPATH": str(work), "APPTAINERENV_PYTHONPATH": str(work), "HOME": "/nonexistent",
        "CC": "icc", "LC_ALL": "en_US.UTF-8",
    }  # fmt: skip
    result = sif.run(*SHORT, work=work, environment=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "setlocale" not in result.stderr
    assert summary(work)["steps"] == 2


def test_the_line_of_the_workshop(sif: Sif) -> None:
    work = sif.work_folder("workshop")
    result = sif.run(
        "nemo", "llm", "finetune", "--factory", "llama31_8b", "trainer.devices=1",
        "trainer.max_steps=250", "data.global_batch_size=8", "optim.lr_scheduler.warmup_steps=50",
        "--dryrun", work=work, verb=("exec", "--nv"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "this is lora-train, not NVIDIA NeMo" in result.stderr
    assert "max_steps: 250" in result.stdout


def test_a_signal_stops_with_a_checkpoint_and_the_same_line_goes_on(sif: Sif) -> None:
    work = sif.work_folder("signal")
    words = ("--max-steps", "60", "eval.num_generate=0", "trainer.limit_val_batches=1")
    process = sif.start(*words, work=work)
    metrics = work / "runs/quickstart/metrics.jsonl"
    limit = time.monotonic() + 600
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors[-4000:]
    assert "exit status 75" in errors
    checkpoints = list((work / "runs/quickstart/checkpoints").iterdir())
    assert checkpoints
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    again = sif.run("--max-steps", str(step + 1), *words[2:], work=work)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"going on from runs/quickstart/checkpoints/{checkpoints[0].name}" in again.stderr


def test_two_runs_in_one_folder(sif: Sif) -> None:
    work = sif.work_folder("two runs")
    words = ("--max-steps", "500", "eval.num_generate=0", "trainer.limit_val_batches=1")
    first = sif.start(*words, work=work)
    try:
        limit = time.monotonic() + 600
        while not (work / "runs/quickstart/config.yaml").exists():
            assert first.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
        second = sif.run(*words, work=work)
        assert second.returncode == 2
        assert "is in use by another lora-train" in second.stderr
        assert "log.name=" in second.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=600)
    assert first.returncode == 75


def test_a_read_only_folder_and_a_full_cache(sif: Sif) -> None:
    work = sif.work_folder("read-only")
    os.chown(work, 0, 0)
    result = sif.run(*SHORT, work=work)
    assert result.returncode == 2
    assert "log.log_dir=" in result.stderr
    assert "Traceback" not in result.stderr

    work, full = sif.work_folder("full"), sif.work_folder("full cache")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        (full / "file").write_bytes(b"x" * 65536)
        verb = ("run", "--nv", "--bind", str(full))
        result = sif.run(*SHORT, work=work, verb=verb, environment={"LORA_CACHE_DIR": str(full)})
    finally:
        subprocess.run(["umount", str(full)], check=True)
    # what this run would keep there, it can do without
    assert result.returncode == 0, result.stderr
    # as one line, however wide the terminal is taken to be
    said = " ".join(result.stderr.split())
    assert f"warning: storage: cache LORA_CACHE_DIR {full} cannot be written: No space" in said
    assert "hint: export LORA_CACHE_DIR=" in said
    assert summary(work)["steps"] == 2


def test_preflight_and_help_answer(sif: Sif) -> None:
    work = sif.work_folder("questions")
    findings = sif.run("preflight", "--json", work=work)
    assert {finding["level"] for finding in json.loads(findings.stdout)} <= {
        "ok", "warning", "skipped",
    }, findings.stdout  # fmt: skip
    assert "usage: lora-train" in sif.run("--help", work=work).stdout
    shell = sif.run("bash", "-c", 'echo "$HF_HOME"', work=work)
    assert shell.stdout.strip() == f"{work}/.lora_cache/huggingface"
    assert sif.run("no-such-command", work=work).returncode == 2


def test_a_gpu_that_is_too_old(sif: Sif) -> None:
    """A V100, as a stand-in for NVML shows it: refused before torch is loaded."""
    work = sif.work_folder("v100")
    source = REPOSITORY / "tests/preflight/fake_nvml.c"
    library, driver = work / "libnvidia-ml.so.1", work / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    empty = ["gcc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", driver]
    subprocess.run(empty, check=True)
    environment = {"APPTAINER_CONTAINLIBS": f"{library},{driver}", "FAKE_GPUS": "7.0,0,-1"}
    result = sif.run(*SHORT, work=work, environment=environment)
    assert result.returncode == 2, result.stderr
    assert "compute capability 7.0" in result.stderr
    assert "#SBATCH --constraint=a100" in result.stderr
    assert not (work / "runs").exists()


def test_what_it_tells_of_itself(sif: Sif) -> None:
    result = subprocess.run(
        ["make", "sif-test", f"SIF={sif.path}"], cwd=REPOSITORY, env=engine_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True)
    if "LORA_TEST_SIF" not in os.environ:  # that one may be of another commit
        assert f"org.opencontainers.image.revision: {commit.strip()}" in result.stdout
    assert "org.opencontainers.image.version: " in result.stdout
    assert "transformers==5.23.0" in result.stdout
    help_text = subprocess.run(
        ["apptainer", "run-help", str(sif.path)], env=engine_environment(),
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "singularity run --nv lora.sif" in help_text
