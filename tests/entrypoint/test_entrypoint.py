"""Words, programs and signals through the entrypoint, with a stub in place of the trainer."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import subprocess
import termios
from pathlib import Path

import pytest
from small_image import Image, is_running


@pytest.mark.parametrize("words", [(), ("--max-steps", "250"), ("trainer.max_steps=2", "-h=no")])
def test_options_and_keys_train(image: Image, words: tuple[str, ...]) -> None:
    process = image.start(*words, STUB="wait")
    image.pid("monitor"), image.pid("trainer")
    process.terminate()
    process.communicate(timeout=60)
    assert image.argv == list(words)
    assert sorted(image.order[:2]) == ["monitor start", "trainer start"]
    assert image.order[2:] == ["trainer end", "monitor end"]


def test_words_arrive_as_they_were_given(image: Image) -> None:
    words = ["data.path=my data/a'b.jsonl", 'x="$HOME"', "", "*", "a\nb", "--name=$(false)"]
    assert image.run("--first", *words).returncode == 0
    assert image.argv == ["--first", *words]


def test_all_doors_lead_to_the_same_run(image: Image) -> None:
    image.run("--max-steps", "5")
    first = (image.argv, {k: v for k, v in image.seen.items() if k not in ("_", "LORA_STATE_DIR")})
    for door, words in [
        ("entrypoint/entrypoint.sh", ["lora-train", "--max-steps", "5"]),
        ("bin/lora-train", ["--max-steps", "5"]),
    ]:
        image.run(*words, door=door)
        seen = {k: v for k, v in image.seen.items() if k not in ("_", "LORA_STATE_DIR")}
        assert (image.argv, seen) == first


def test_nemo_is_a_run_of_its_own_words(image: Image) -> None:
    words = ["llm", "finetune", "--factory", "llama31_8b"]
    image.run(*words, door="bin/nemo")
    assert image.argv == ["nemo", *words]
    assert "monitor start" in image.order


@pytest.mark.parametrize(
    "words", [("preflight", "--json"), ("generate", "runs/x"), ("--help",), ("a=1", "--dry-run")]
)
def test_a_question_is_no_run(image: Image, words: tuple[str, ...]) -> None:
    result = image.run(*words, STUB="3")
    assert result.returncode == 3
    assert image.argv == list(words)
    assert image.order == ["trainer start", "trainer end"]
    assert result.stderr == ""
    assert image.seen["HF_HOME"].startswith(str(image.work))


def test_programs_of_the_image_run_with_its_caches(image: Image) -> None:
    result = image.run("bash", "-c", 'echo "$HF_HOME"; exit 7')
    assert result.returncode == 7
    assert result.stdout.strip() == f"{image.work}/.lora_cache/huggingface"
    image.run("download", "some/model", door="bin/hf")
    assert image.argv == ["download", "some/model"]
    assert image.seen["HF_HOME"] == f"{image.work}/.lora_cache/huggingface"


def test_torchrun_starts_one_watched_run_on_a_node(image: Image) -> None:
    processes = [
        image.start("--max-steps=1", door="bin/lora-train", RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1", "2")
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert image.order.count("trainer end") == 3
    assert len([line for text in errors for line in text.splitlines() if " starts 20" in line]) == 1


def test_a_process_that_a_run_starts_is_not_a_second_run(image: Image) -> None:
    image.run("--max-steps=1", door="bin/lora-train", LORA_STATE_DIR=str(image.tmp))
    assert image.order == ["trainer start", "trainer end"]


def test_a_signal_while_starting_may_be_tried_again(image: Image) -> None:
    """Slurm preempts at any moment; a job that requeues on 75 must see it."""
    (image.root / "entrypoint/lib/driver.sh").write_text(
        "prefer_compat_libraries() { sleep 1; echo late >&2; sleep 1; }\n"
    )
    process = image.start("--max-steps=1")
    assert process.stderr is not None
    assert process.stderr.readline() == "late\n"
    process.terminate()
    assert process.wait(timeout=60) == 75
    assert not (image.out / "argv").exists()


def test_a_question_to_the_terminal_does_not_stop_the_run(image: Image) -> None:
    """A process in the background that reads from its terminal is stopped for good."""
    for name in ("lora-train", "python"):
        stub = image.root / "venv/bin" / name
        stub.write_text(stub.read_text().replace("out=$STUB_OUT", "out=$STUB_OUT; read -r line", 1))
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [image.root / "entrypoint/entrypoint.sh", "--max-steps=1"], cwd=image.work,
        env=image.environment(), stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    try:
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize("status", ["0", "1", "2", "75", "137"])
def test_the_exit_status_is_the_trainers(image: Image, status: str) -> None:
    result = image.run("--max-steps=1", STUB=status)
    assert result.returncode == int(status)
    assert f"exit status {status}" in result.stderr
    assert "lora-train 1.2.3 (abc) starts 20" in result.stderr
    assert f"on {os.uname().nodename}" in result.stderr
    assert not list(image.tmp.glob("lora-train-*/run-*"))


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1"])
def test_signals_reach_the_trainer_once(image: Image, name: str) -> None:
    process = image.start("--max-steps=1", STUB="wait")
    trainer, monitor = image.pid("trainer"), image.pid("monitor")
    process.send_signal(getattr(signal, f"SIG{name}"))
    signals = image.out / "signals"
    image.wait_for(lambda: signals.exists())
    if name == "USR1":  # the stub goes on after it, as a trainer that saves
        assert process.poll() is None
        assert is_running(monitor)
        process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert signals.read_text().split() == ([name] if name != "USR1" else ["USR1", "TERM"])
    assert not is_running(trainer)
    assert not is_running(monitor)
    assert image.order[-2:] == ["trainer end", "monitor end"]


def test_ctrl_c_in_a_terminal_is_one_signal(image: Image) -> None:
    """It reaches the terminal's whole process group; a second one would stop without saving."""
    process = image.start("--max-steps=1", STUB="wait")
    trainer = image.pid("trainer")
    assert os.getpgid(trainer) != os.getpgid(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (image.out / "signals").read_text().split() == ["INT"]


def test_a_trainer_that_is_killed_is_named_so_and_the_monitor_ends(image: Image) -> None:
    process = image.start("--max-steps=1", STUB="wait")
    monitor = image.pid("monitor")
    os.kill(image.pid("trainer"), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "--mem" in errors
    assert not is_running(monitor)


def test_the_trainer_is_asked_to_stop_when_the_entrypoint_is_killed(image: Image) -> None:
    process = image.start("--max-steps=1", STUB="wait")
    trainer, monitor = image.pid("trainer"), image.pid("monitor")
    process.kill()
    process.wait(timeout=60)
    image.wait_for(lambda: not is_running(trainer))
    assert (image.out / "signals").read_text().split() == ["TERM"]
    # the stub of the monitor cannot know; the real one is tested in test_gpu_monitor.py
    os.kill(monitor, signal.SIGKILL)


def test_what_leaks_in_from_the_host_is_closed(image: Image) -> None:
    image.run(
        "--max-steps=1",
        PYTHONPATH="/elsewhere", PYTHONHOME="/elsewhere", CC="icc -fast", USER="unset",
    )  # fmt: skip
    assert not {"PYTHONPATH", "PYTHONHOME", "CC"} & image.seen.keys()
    assert image.seen["PYTHONNOUSERSITE"] == image.seen["PYTHONSAFEPATH"] == "1"
    assert image.seen["USER"] == pwd.getpwuid(os.getuid()).pw_name
    image.run("--max-steps=1", CC="gcc")
    assert image.seen["CC"] == "gcc"


@pytest.mark.parametrize(
    ("driver", "cuda", "is_used"),
    [("470.82.01", "12.6", True), ("525.60.13", "12.6", False), ("550.54.15", "13.0", False),
     ("580.65.06", "13.0", False), ("nonsense", "12.6", False)],
)  # fmt: skip
def test_compatibility_libraries_only_for_an_older_driver(
    image: Image, tmp_path: Path, driver: str, cuda: str, is_used: bool
) -> None:
    tools, compat = tmp_path / "tools", tmp_path / "compat"
    for folder in (tools, compat):
        folder.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n")
    (tools / "nvidia-smi").chmod(0o755)
    (compat / "libcuda.so.560.35.05").touch()
    (compat / "libcuda.so.1").symlink_to("libcuda.so.560.35.05")
    library = image.root / "entrypoint/lib/driver.sh"
    library.write_text(library.read_text().replace("/usr/local/cuda/compat", str(compat)))
    (image.root / "image.json").write_text(f'{{\n "cuda": "{cuda}"\n}}')
    path = f"{tools}:{image.environment()['PATH']}"
    result = image.run("--max-steps=1", PATH=path, LD_LIBRARY_PATH="/host/libs")
    # what the image brings (560) is new enough for CUDA 12, and too old for CUDA 13
    if is_used:
        assert image.seen["LD_LIBRARY_PATH"] == f"{compat}:/host/libs"
        assert f"NVIDIA driver {driver} is older" in result.stderr
    else:
        assert image.seen["LD_LIBRARY_PATH"] == "/host/libs"


def test_the_kernels_of_the_image_are_found_in_the_cache(image: Image) -> None:
    entry = image.root / "triton_cache" / "KEY"
    entry.mkdir(parents=True)
    for name in ("__grp__k.json", "k.cubin", "cuda_utils.so"):
        (entry / name).write_text("from the image")
    mine = image.tmp / f"lora-train-{os.getuid()}" / "triton"
    (mine / "KEY").mkdir(parents=True)
    (mine / "KEY" / "cuda_utils.so").write_text("compiled here")
    image.run("--max-steps=1")
    assert image.seen["TRITON_CACHE_DIR"] == str(mine)
    assert (mine / "KEY" / "__grp__k.json").read_text() == "from the image"
    assert (mine / "KEY" / "cuda_utils.so").read_text() == "compiled here"
    assert not (mine / "KEY" / "k.cubin").exists()
