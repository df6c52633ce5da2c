"""The GPU monitor as the entrypoint runs it, on stand-ins for nvidia-smi and NVML."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_train.run_directory import publish_run_directory

HERE = Path(__file__).parent
HEADER = (
    "timestamp, index, utilization.gpu [%], memory.used [MiB], memory.total [MiB], "
    "power.draw [W], temperature.gpu, clocks.current.sm [MHz], clocks_event_reasons.active, uuid"
)
NONE_HERE = "gpu monitor: no NVIDIA GPU here; nothing is recorded\n"
SAMPLING = "gpu monitor: a sample every 0.1 s of GPU 0 NVIDIA A100-SXM4-80GB; GPU 1 "
MONITOR = ["-m", "lora_train.gpu_monitor"]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub library; without FAKE_NVML=0 it is as if there were none."""
    folder = tmp_path_factory.mktemp("nvml")
    stub = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", stub, HERE / "gpu_nvml.c"], check=True)
    return folder


class Start:
    """One start of the image: its state folder, its run directory and its monitor."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.state, self.run_directory = folder / "state dir", folder / "run dir"
        for path in (self.state, self.run_directory):
            path.mkdir(parents=True)
        self.log = self.run_directory / "gpu_memory_log.csv"
        self.smi_pid = folder / "smi.pid"
        self.environment = environment | {
            "LORA_STATE_DIR": str(self.state), "FAKE_PID": str(self.smi_pid),
        }  # fmt: skip
        self._stderr = folder / "stderr"

    def publish(self, run_directory: Path | None = None) -> Start:
        (self.state / "run_directory").write_text(f"{run_directory or self.run_directory}\n")
        return self

    def monitor(self, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        with self._stderr.open("ab") as stderr:
            return subprocess.Popen(
                [sys.executable, *(words or MONITOR)],
                env=self.environment | variables,
                stderr=stderr,
                cwd=self.state,
            )

    def run(self, *words: str, until: int = 4, **variables: str) -> str:
        """Let a monitor write `until` rows, end it as the entrypoint does, return its stderr."""
        process = self.monitor(*words, **variables)
        wait_for(lambda: len(self.rows()) >= until or process.poll() is not None)
        process.terminate()
        assert process.wait() == 0
        assert not self.smi_pid.exists() or not is_alive(int(self.smi_pid.read_text()))
        return self.stderr()

    def stderr(self) -> str:
        return self._stderr.read_text()

    def rows(self) -> list[list[str]]:
        """Rows below the one header."""
        if not self.log.exists():
            return []
        header, *lines = self.log.read_text().splitlines()
        assert header == HEADER
        return [line.split(", ") for line in lines]


@pytest.fixture
def new_start(tmp_path: Path, nvml: Path) -> Iterator[Callable[[], Start]]:
    programs = tmp_path / "programs"
    programs.mkdir()
    shutil.copy(HERE / "gpu_nvidia_smi.sh", programs / "nvidia-smi")
    (programs / "nvidia-smi").chmod(0o755)
    for name in ("sh", "sleep", "date", "tr"):  # nothing else: the machine may have a GPU
        os.symlink(str(shutil.which(name)), programs / name)
    temporary = tmp_path / "node's own disk"
    temporary.mkdir()
    environment = {
        "PATH": str(programs),
        "TMPDIR": str(temporary),
        "LD_LIBRARY_PATH": str(nvml),
        "LORA_MONITOR_SECONDS": "0.1",
        "PYTHONSAFEPATH": "1",
    }
    starts: list[Start] = []

    def make() -> Start:
        starts.append(Start(tmp_path / f"start {len(starts)}", environment))
        return starts[-1]

    yield make
    for start in starts:  # what a failed test left running
        if start.smi_pid.exists() and is_alive(pid := int(start.smi_pid.read_text())):
            os.kill(pid, signal.SIGTERM)


@pytest.fixture
def start(new_start: Callable[[], Start]) -> Start:
    return new_start()


class TestRows:
    def test_of_nvidia_smi(self, start: Start) -> None:
        assert start.publish().run().startswith(SAMPLING)
        first, second = start.rows()[:2]
        assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}", first[0])
        rest = ["97", "0", "81920", "301.50", "61", "1410", "0x0000000000000001"]
        assert first[1:] == ["0", *rest, "GPU-aaaa"]
        assert second[1:] == ["1", *rest, "GPU-bbbb"]

    def test_unsupported_values(self, start: Start) -> None:
        start.publish().run(FAKE_MODE="na")
        assert start.rows()[0][2] == start.rows()[0][5] == "[N/A]"

    def test_old_driver(self, start: Start) -> None:
        start.publish().run(FAKE_MODE="old")
        assert start.rows()[0][8] == "0x0000000000000004"

    @pytest.mark.parametrize("mode", ["missing", "nodriver"])
    def test_of_nvml(self, start: Start, mode: str) -> None:
        if mode == "missing":
            Path(start.environment["PATH"], "nvidia-smi").unlink()
        said = start.publish().run(FAKE_MODE=mode, FAKE_NVML="0")
        assert said.startswith(SAMPLING)
        assert ("ended with status 9: NVIDIA-SMI has failed" in said) == (mode == "nodriver")
        first, second = start.rows()[:2]
        assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}", first[0])
        rest = ["1024", "81920", "200.50", "[N/A]", "[N/A]", "0x0000000000000001"]
        assert first[1:] == ["0", "51", *rest, "GPU-aaaa"]
        assert second[1:] == ["1", "52", *rest, "GPU-bbbb"]

    def test_slices_are_named(self, start: Start) -> None:
        said = start.publish().run(FAKE_MODE="mig", CUDA_VISIBLE_DEVICES="MIG-2-GPU-bbbb")
        assert said == (
            "gpu monitor: a sample every 0.1 s of GPU 1 NVIDIA A100-SXM4-80GB is split (MIG): "
            "MIG 1g.10gb; utilization of a slice is not reported\n"
        )
        assert {(row[1], row[2]) for row in start.rows()} == {("1", "[N/A]")}

    def test_slices_are_named_by_nvml(self, start: Start) -> None:
        said = start.publish().run(FAKE_MODE="nodriver", FAKE_NVML="0", FAKE_MIG="1")
        assert "GPU 0 NVIDIA A100-SXM4-80GB; GPU 1 NVIDIA A100-SXM4-80GB is split" in said
        assert "(MIG): MIG 3g.40gb; utiliz" in said


class TestSourcesThatFail:
    @pytest.mark.parametrize(
        ("variables", "said"),
        [
            ({"PATH": "/nonexistent"}, NONE_HERE),
            ({"FAKE_MODE": "nodriver"}, "gpu monitor: nvidia-smi ended with status 9: NVIDIA-SMI"),
            ({"PATH": "", "FAKE_NVML": "18"}, "gpu monitor: NVML ended with status 1: RM has dete"),
        ],
    )
    def test_nothing_works(self, start: Start, variables: dict[str, str], said: str) -> None:
        process = start.publish().monitor(**variables)
        assert process.wait() == 0
        assert start.stderr().startswith(said)
        assert start.stderr().count("\n") == 1
        assert not start.log.exists()

    def test_nvidia_smi_hangs(self, start: Start) -> None:
        code = (
            "from lora_train import gpu_monitor, gpu_samples;"
            "gpu_samples.START_SECONDS = 2.0; gpu_monitor.main()"
        )
        said = start.publish().run("-c", code, FAKE_MODE="hang", FAKE_NVML="0")
        assert "nvidia-smi prints nothing within 2 s; going on with NVML" in said
        assert start.rows()[0][2] == "51"

    def test_nvidia_smi_dies_and_nvml_goes_on(self, start: Start) -> None:
        said = start.publish().run(until=10, FAKE_MODE="die", FAKE_NVML="0")
        assert said.count("\n") == 2
        assert said.endswith("nvidia-smi ended with status 255; going on with NVML\n")
        assert [row[2] for row in start.rows()][:10] == ["97"] * 6 + ["51", "52"] * 2

    def test_nvidia_smi_dies_before_the_run_directory_is_known(self, start: Start) -> None:
        process = start.monitor(FAKE_MODE="die")
        wait_for(lambda: "nothing more is recorded" in start.stderr())
        assert not start.log.exists()
        start.publish()
        assert process.wait() == 0
        assert len(start.rows()) == 6

    @pytest.mark.parametrize("text", ["abc", "0", "-1", "nan", "inf"])
    def test_bad_interval(self, start: Start, text: str) -> None:
        said = start.publish().run(until=2, LORA_MONITOR_SECONDS=text)
        assert said.startswith(f"gpu monitor: LORA_MONITOR_SECONDS='{text}': expected a positive")
        assert "a sample every 5 s" in said

    def test_no_state_folder(self, start: Start) -> None:
        assert start.monitor(LORA_STATE_DIR="").wait() == 0
        assert start.stderr() == (
            "gpu monitor: LORA_STATE_DIR='' is not a folder; nothing is recorded\n"
        )


class TestFile:
    def test_rows_from_before_the_run_directory_was_known(self, start: Start) -> None:
        process = start.monitor()
        wait_for(start.smi_pid.exists)
        time.sleep(0.3)
        publish_in(start)
        wait_for(lambda: len(start.rows()) >= 10)
        process.terminate()
        assert process.wait() == 0
        assert [int(row[3]) for row in start.rows()[:10]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    def test_never_published(self, start: Start) -> None:
        process = start.monitor()
        wait_for(start.smi_pid.exists)
        process.terminate()
        assert process.wait() == 0
        assert list(start.run_directory.iterdir()) == []

    def test_a_resumed_run_appends(self, start: Start) -> None:
        start.publish().run(until=4)
        before = start.rows()
        start.run(until=len(before) + 4)
        assert start.rows()[: len(before)] == before
        assert len(start.rows()) >= len(before) + 4

    def test_one_file_a_node(self, start: Start) -> None:
        start.log = start.run_directory / f"gpu_memory_log-{os.uname().nodename}.csv"
        start.publish().run(SLURM_JOB_NUM_NODES="2")
        assert len(start.rows()) >= 4

    def test_full_disk(self, start: Start) -> None:
        start.log.symlink_to("/dev/full")
        process = start.publish().monitor()
        wait_for(lambda: "cannot write" in start.stderr())
        time.sleep(0.5)
        start.log.unlink()
        wait_for(lambda: start.log.exists() and len(start.rows()) >= 4)
        process.terminate()
        assert process.wait() == 0
        assert [int(row[3]) for row in start.rows()[:4]] == [0, 0, 1, 1]
        assert start.stderr().count("\n") == 2
        assert "gpu_memory_log.csv: No space left on device; the run goes on" in start.stderr()

    def test_deleted_run_directory(self, start: Start) -> None:
        process = start.publish().monitor()
        wait_for(lambda: len(start.rows()) >= 4)
        shutil.rmtree(start.run_directory)
        wait_for(lambda: "No such file or directory; the run goes on" in start.stderr())
        process.terminate()
        assert process.wait() == 0
        assert not start.run_directory.exists()
        assert start.stderr().count("\n") == 2


class TestOncePerNode:
    def test_two_tasks_that_see_the_same_gpus(self, new_start: Callable[[], Start]) -> None:
        job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
        first, second = new_start(), new_start()
        monitors = [start.publish(first.run_directory).monitor(**job) for start in (first, second)]
        wait_for(lambda: any(monitor.poll() is not None for monitor in monitors))
        wait_for(lambda: len(first.rows()) >= 6)
        for monitor in monitors:
            monitor.terminate()
            assert monitor.wait() == 0
        assert sorted(start.stderr().count("\n") for start in (first, second)) == [0, 1]
        samples = Counter((row[1], row[3]) for row in first.rows())
        assert max(samples.values()) == 1

    def test_two_tasks_that_see_one_gpu_each(self, new_start: Callable[[], Start]) -> None:
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0"}
        first, second = new_start(), new_start()
        monitors = [
            start.publish(first.run_directory).monitor(**job, FAKE_UUIDS=uuid)
            for start, uuid in ((first, "GPU-aaaa"), (second, "GPU-bbbb"))
        ]
        wait_for(lambda: {row[9] for row in first.rows()} == {"GPU-aaaa", "GPU-bbbb"})
        for monitor in monitors:
            monitor.terminate()
            assert monitor.wait() == 0

    def test_two_runs_without_slurm(self, new_start: Callable[[], Start]) -> None:
        first, second = new_start(), new_start()
        monitors = [start.publish().monitor() for start in (first, second)]
        wait_for(lambda: len(first.rows()) >= 4 and len(second.rows()) >= 4)
        for monitor in monitors:
            monitor.terminate()
            assert monitor.wait() == 0

    def test_the_next_run_of_a_job(self, start: Start) -> None:
        start.publish().run(until=2, SLURM_JOB_ID="7")
        start.run(until=len(start.rows()) + 2, SLURM_JOB_ID="7")

    def test_no_place_for_locks(self, start: Start) -> None:
        Path(start.environment["TMPDIR"], f"lora-train-{os.getuid()}").write_text("")
        start.publish().run()
        assert len(start.rows()) >= 4


class TestEnd:
    def test_signals_for_the_trainer_are_not_for_the_monitor(self, start: Start) -> None:
        process = start.publish().monitor()
        wait_for(lambda: len(start.rows()) >= 2)
        for pid in (process.pid, int(start.smi_pid.read_text())):
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGINT)
        seen = len(start.rows())
        wait_for(lambda: len(start.rows()) >= seen + 6)
        process.terminate()
        assert process.wait() == 0

    @pytest.mark.parametrize("killed", ["parent", "monitor"])
    def test_nothing_outlives_a_killed_parent(self, start: Start, killed: str) -> None:
        pid_file = start.state / "monitor.pid"
        script = f'"{sys.executable}" -m lora_train.gpu_monitor & echo $! >monitor.pid; wait'
        parent = subprocess.Popen(
            ["sh", "-c", script],
            env=start.publish().environment, cwd=start.state, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: len(start.rows()) >= 2)
        monitor, smi = int(pid_file.read_text()), int(start.smi_pid.read_text())
        os.kill(parent.pid if killed == "parent" else monitor, signal.SIGKILL)
        wait_for(lambda: not is_alive(monitor) and not is_alive(smi))
        parent.wait()


def publish_in(start: Start) -> None:
    """Publish by the trainer's own function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_STATE_DIR", str(start.state))
        publish_run_directory(start.run_directory)


class TestPublishing:
    def test_one_line_with_the_absolute_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        publish_run_directory(Path("runs/a b"))
        assert (tmp_path / "run_directory").read_text() == f"{tmp_path}/runs/a b\n"
        assert [path.name for path in tmp_path.iterdir()] == ["run_directory"]

    @pytest.mark.parametrize("state", ["", "/nonexistent"])
    def test_outside_the_image(
        self, state: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("LORA_STATE_DIR", state)
        publish_run_directory(Path("runs/a"))
        assert caplog.text == ""

    def test_failure_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "run_directory").mkdir()
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
        publish_run_directory(Path("runs/a"))
        assert "no GPU log: cannot write" in caplog.text
