"""Room, quotas, permissions and locks, broken for real where the machine permits it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from lora_train.model_size import checkpoint_bytes
from lora_train.preflight import folders
from lora_train.preflight.caches import caches_written, check_home
from lora_train.preflight.folders import existing_parent, file_system
from lora_train.preflight.nvml import Gpu, GpuReport
from lora_train.preflight.storage import check_storage

LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture
def model(workplace):
    """A local model of 1 B parameters, as far as it is looked at before the run."""
    (workplace / "model").mkdir()
    (workplace / "model/config.json").write_text(json.dumps(LLAMA_1B))
    (workplace / "model/model.safetensors").touch()
    return f"model.path={workplace / 'model'}"


def wrong(findings):
    return [finding for finding in findings if finding.level != "ok"]


def test_there_is_room(machine, configured, model, workplace):
    assert wrong(check_storage(machine, configured(model))) == []
    # nothing is left of what was tried
    assert sorted(path.name for path in workplace.iterdir()) == ["model"]


def test_checkpoints_of_a_known_model(machine, configured, model):
    # 11,272,192 parameters are trained with rank 16 on all seven layers
    config = configured(model, "peft.dim=16", "log.ckpt.keep_last=2")
    trainable = 11_272_192
    assert checkpoint_bytes(trainable, config) == trainable * (3 * 12 + 4)
    [finding] = [one for one in check_storage(machine, config) if "run directory" in one.seen]
    assert f"{trainable * 40 / 2**20 + 16:.1f} MiB needed" in finding.seen


def test_a_short_run_writes_fewer_checkpoints(configured, model):
    for steps, every, num_checkpoints in ((20, 50, 1), (50, 50, 2), (1000, 50, 3), (1000, None, 1)):
        config = configured(
            model, f"trainer.max_steps={steps}", f"log.ckpt.every_n_train_steps={every or 'null'}"
        )
        assert checkpoint_bytes(1000, config) == 1000 * (12 * num_checkpoints + 4)


def test_results_inside_a_container_are_lost_with_it(machine, configured, model, mounted):
    memory = mounted("size=2g")
    words = (model, f"log.log_dir={memory}")
    assert wrong(check_storage(machine, configured(*words))) == []
    machine.file("/.dockerenv").parent.mkdir(exist_ok=True)
    machine.file("/.dockerenv").touch()
    (machine.root / "proc/self").mkdir(parents=True)
    shutil.copy("/proc/self/mountinfo", machine.root / "proc/self/mountinfo")
    [finding] = wrong(check_storage(machine, configured(*words)))
    assert finding.level == "warning"
    assert "lies inside the container (tmpfs)" in finding.seen
    assert '-v "$PWD":/workspace' in finding.mend


def test_too_few_bytes(machine, configured, model, mounted):
    small = mounted("size=64m")
    [finding] = wrong(check_storage(machine, configured(model, f"log.log_dir={small}")))
    assert finding.level == "error"
    assert finding.seen.startswith(f"run directory {small}/quickstart: 64.0 MiB free")
    assert finding.mend == "log.log_dir=/path/on/scratch"


def test_what_a_run_goes_on_with_is_not_counted_twice(machine, configured, model, mounted):
    # 316 MiB are needed in all
    small = mounted("size=320m")
    words = (model, f"log.log_dir={small}", "log.ckpt.keep_last=1", "peft.dim=16")
    checkpoint = small / "quickstart/checkpoints/step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_bytes(b"x" * (130 * 2**20))
    assert wrong(check_storage(machine, configured(*words))) == []
    assert wrong(check_storage(machine, configured(*words, "resume.mode=never")))


def test_too_few_files(machine, configured, model, mounted):
    full = mounted("nr_inodes=20")
    [finding] = wrong(check_storage(machine, configured(model, f"log.log_dir={full}")))
    assert finding.level == "error"
    assert "more files can be made (" in finding.seen


def test_folders_on_one_file_system_share_its_room(
    machine, configured, model, mounted, monkeypatch
):
    # enough for each alone: checkpoints, and the embedded model while it is made
    shared = mounted("size=700m")
    monkeypatch.setenv("LORA_CACHE_DIR", str(shared / "cache"))
    embedded = configured("peft.dim=64")
    assert wrong(check_storage(machine, embedded)) == []
    (shared / "other").write_bytes(b"x" * (120 * 2**20))
    both = configured("peft.dim=64", f"log.log_dir={shared / 'runs'}")
    assert wrong(check_storage(machine, both))


def test_a_read_only_file_system(machine, configured, model, mounted, monkeypatch):
    folder = mounted("ro")
    config = configured(model, f"log.log_dir={folder / 'runs'}")
    [finding] = wrong(check_storage(machine, config))
    assert "cannot be written: Read-only file system" in finding.seen
    monkeypatch.setenv("APPTAINER_CONTAINER", "lora.sif")
    [finding] = wrong(check_storage(machine, config))
    assert f"singularity run --nv --bind {folder} lora.sif" in finding.mend


def test_a_folder_that_cannot_be(machine, configured, model, workplace, monkeypatch):
    (workplace / "file").touch()
    monkeypatch.setenv("LORA_CACHE_DIR", "/proc/cache")
    config = configured(model, "data.path=chats.jsonl", "log.log_dir=file/runs")
    first, second = wrong(check_storage(machine, config))
    assert first.seen.startswith("run directory file/runs/quickstart cannot be written: ")
    assert second.seen.startswith("cache LORA_CACHE_DIR /proc/cache cannot be written: ")
    assert second.mend == "export LORA_CACHE_DIR=/path/on/scratch"
    # prepared data alone goes there: the run goes on without
    assert (first.level, second.level) == ("error", "warning")
    [must_be_made] = wrong(check_storage(machine, configured()))
    assert must_be_made.level == "error"


def test_a_gguf_file_is_converted_into_the_cache(machine, configured, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORA_CACHE_DIR", str(cache))

    def cache_of(name):
        with (tmp_path / name).open("wb") as sparse:
            sparse.truncate(1000)
        [found, *_] = caches_written(machine, configured(f"model.path={tmp_path / name}"))
        return found.needed

    data = cache_of("model-8B-Q4_K_M.gguf") - 16 * 10**9  # its name tells the parameters
    assert cache_of("model.gguf") - data == 4000
    assert cache_of("model.Q8_0.gguf") - data == 2000
    assert cache_of("model-f16.gguf") - data == 1000
    (cache / "gguf/hash").mkdir(parents=True)  # perhaps this one
    assert cache_of("model.gguf") == data


def test_links_that_lead_nowhere(machine, configured, model, workplace, monkeypatch):
    (workplace / "runs").symlink_to("/nonexistent/my scratch")
    [finding] = wrong(check_storage(machine, configured(model)))
    assert finding.level == "error"
    assert "runs is a link to /nonexistent/my scratch, which does not exist" in finding.seen
    monkeypatch.setenv("APPTAINER_CONTAINER", "lora.sif")
    [finding] = wrong(check_storage(machine, configured(model)))
    assert "--bind '/nonexistent/my scratch' lora.sif" in finding.mend


def test_a_file_system_that_does_not_tell_its_room(machine, configured, model, monkeypatch):
    monkeypatch.setattr(folders.os, "statvfs", lambda path: os.statvfs_result((0,) * 10))
    findings = check_storage(machine, configured(model))
    assert wrong(findings) == []
    assert "free space not known" in findings[0].seen


@pytest.mark.parametrize(
    ("number", "is_refused"),
    [(errno.EDQUOT, True), (errno.ENOSPC, True), (errno.EOPNOTSUPP, False)],
)
def test_a_quota_that_is_full(built, preflight, model, workplace, number, is_refused):
    if file_system(Path("/"), workplace) == "tmpfs":
        pytest.skip("no quota is looked for in memory")
    found = preflight(model, LD_PRELOAD=str(built / "libcalls.so"), FAKE_FALLOCATE=str(number))
    refused = [each for each in found if each["check"] == "storage" and each["level"] == "error"]
    assert bool(refused) == is_refused
    if is_refused:
        assert os.strerror(number) in refused[0]["seen"]
        assert "lfs quota" in refused[0]["mend"]


def locks(preflight, built, how):
    found = preflight(LD_PRELOAD=str(built / "libcalls.so"), FAKE_FLOCK=str(how))
    [finding] = [each for each in found if each["check"] == "locks"]
    return finding


@pytest.mark.parametrize(
    ("how", "level", "words"),
    [
        ("granted", "warning", "do not hold: two processes got the same one"),
        ("hangs", "warning", "did not answer within 2 s"),
        (errno.ENOLCK, "error", "are refused (No locks available)"),
        (errno.ENOSYS, "warning", "are not supported (Function not implemented)"),
    ],
)
def test_locks_that_do_not_work(preflight, built, how, level, words):
    finding = locks(preflight, built, how)
    assert finding["level"] == level
    assert words in finding["seen"]


def test_locks_that_work(preflight, workplace):
    [finding] = [each for each in preflight() if each["check"] == "locks"]
    assert finding["level"] == "ok"
    assert list(workplace.iterdir()) == []


def test_caches_in_a_small_home(machine, configured, monkeypatch, tmp_path):
    gpus = GpuReport((Gpu(0, "GPU-0", "NVIDIA A100", (8, 0), 0, 0),), "550.54.15", None, True)
    machine = dataclasses.replace(machine, ask_gpus=lambda: gpus)
    config = configured("--factory", "llama31_8b")
    assert check_home(machine, config) == []  # a laptop's home is no matter
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    [finding] = check_home(machine, config)
    assert finding.level == "warning"
    assert finding.mend == (
        "export HF_HOME=/path/on/scratch NEMO_HOME=/path/on/scratch "
        "TRITON_CACHE_DIR=/path/on/scratch"
    )
    assert "this run puts 15.0 GiB there" in finding.why
    for name in ("HF_HOME", "NEMO_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert [each.level for each in check_home(machine, config)] == ["ok"]
    paths = [cache.path.relative_to(tmp_path) for cache in caches_written(machine, config)]
    assert {path.parts[0] for path in paths} == {
        "work", "HF_HOME", "NEMO_HOME", "TRITON_CACHE_DIR",
    }  # fmt: skip


def test_the_images_caches_follow_one_variable(machine, root, configured, monkeypatch, tmp_path):
    (root / "opt/lora").mkdir(parents=True)
    (root / "opt/lora/image.json").touch()
    for name, value in (
        ("SLURM_JOB_ID", "7"),
        ("LORA_CACHE_DIR", str(tmp_path / "home/caches")),
        ("HF_HOME", str(tmp_path / "home/caches/huggingface")),
        ("NEMO_HOME", str(tmp_path / "home/my_nemo")),
    ):
        monkeypatch.setenv(name, value)
    [finding] = check_home(machine, configured("--factory", "llama31_8b"))
    assert finding.mend == "export LORA_CACHE_DIR=/path/on/scratch NEMO_HOME=/path/on/scratch"


@pytest.mark.parametrize("home", ["/nonexistent/user", "/proc", ""])
def test_no_home(preflight, home):
    found = preflight(HOME=home)
    assert not [each for each in found if each["level"] in ("error", "skipped")]


def test_squad_without_a_home_folder(machine, configured, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert caches_written(machine, configured("data.path=squad"))


def test_file_systems(root, workplace):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / {workplace.parent} rw shared:2 master:3 - lustre mds:/scratch rw,flock\n"
        "41 22 0:51 / /other\\040one rw - nfs4 server:/home rw\n"
    )
    assert file_system(root, workplace) == "lustre"
    assert existing_parent(workplace / "a/b/c") == workplace
    (root / "proc/self/mountinfo").unlink()
    assert file_system(root, workplace) == "unknown file system"
