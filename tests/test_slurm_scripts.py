"""The batch scripts in slurm/: what they say, and what they do with Slurm's programs.

`python tests/test_slurm_scripts.py` writes them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_train.commands.job_script import JobScript

SLURM = Path(__file__).parents[1] / "slurm"


def script(what: str, example: str, nodes: int, gpus: int) -> JobScript:
    return JobScript(
        introduction=[
            f"Fine-tune on {what}. sbatch's options stand before the file's name and win over the",
            "lines below, lora-train's words stand behind it:",
            f"  sbatch {example} --factory llama31_8b --max-steps 250",
            "A GPU needs compute capability 8.0 (A100) or newer: --constraint=a100, or as",
            "`sinfo -o '%P %G %f'` names them. `lora-train sbatch` fits such a file to a cluster.",
            "Files outside of $HOME and this folder: APPTAINER_BIND=/scratch (or SINGULARITY_BIND)",
            "sbatch ... A --time of less than 10 minutes: add --signal=TERM@60.",
        ],
        nodes=nodes,
        gpus_per_node=str(gpus),
        cpus_per_node=8 * gpus,
        memory_per_node=f"{60 * gpus}G",
        seconds=4 * 3600,
    )


SCRIPTS = {
    "single_gpu": script("one GPU", "--time=8:00:00 slurm/single_gpu.slurm", 1, 1),
    "multi_gpu": script("one node", "--gpus-per-node=2 slurm/multi_gpu.slurm", 1, 4),
    "multi_node": script("several nodes", "--nodes=4 slurm/multi_node.slurm", 2, 4),
}

# Each stand-in writes its name and words, a line each. What squeue tells of the job comes from
# variables, and so does how srun ends.
RECORD = '#!/bin/bash\nprintf "%s\\n" "${0##*/} $*" >>"$OUT/calls"\n'
STAND_INS = {
    "srun": 'env >"$OUT/environment"; printf "%s\\n" "$@" >"$OUT/words"\n'
    '[ "$1" != mkdir ] || exec "$@"\n'
    '[ -z "${STOP:-}" ] || { kill -s TERM $PPID; /bin/sleep 0.3; }\nexit "${STATUS:-0}"\n',
    "squeue": '[ "$SLURM_TIME_FORMAT" != %s ] || echo "${END-1893553445}"\n',
    "scontrol": 'PAST=$(grep -c "^scontrol" "$OUT/calls")\n[ "$PAST" -gt "${BUSY:-0}" ] || exit 1\n'
    '[ "$1" = requeue ] || echo "   ${STATE-JobState=RUNNING Reason=None}\n'
    '   PreemptTime=${PREEMPTED-None}"\n',
    "sleep": "",
}


@dataclass
class Job:
    """Runs a script as Slurm would: its own copy of it, in the folder it was submitted from."""

    folder: Path

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    def add(self, name: str, body: str = "", where: str = "bin") -> None:
        file = self.folder / where / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(RECORD + body)
        file.chmod(0o755)

    def run(
        self, *words: str, script: Path = SLURM / "multi_gpu.slurm", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        spooled = self.folder / "slurm_script"
        shutil.copy(script, spooled)
        environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "OUT": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "gpu-[1-2]",
            "SLURM_CPUS_PER_TASK": "32",
            "TZ": "UTC",
            **variables,
        }
        return subprocess.run(
            ["bash", spooled, *words],
            cwd=self.folder / "project",
            env=environment,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def srun(self) -> list[str]:
        return (self.folder / "words").read_text().splitlines()

    @property
    def seen(self) -> list[str]:
        return (self.folder / "environment").read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job on a cluster with Singularity on PATH and an image in the folder."""
    if any(Path(folder, "singularity").exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip("there is a real singularity, which the tests without one would find")
    job = Job(tmp_path)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "lora.sif").touch()
    for name, body in STAND_INS.items():
        job.add(name, body)
    job.add("singularity")
    return job


@pytest.mark.parametrize("name", SCRIPTS)
class TestFiles:
    def test_are_what_the_command_prints(self, name: str) -> None:
        assert (SLURM / f"{name}.slurm").read_text() == SCRIPTS[name].text(), (
            "python tests/test_slurm_scripts.py writes them"
        )

    def test_ask_for_a_task_a_node(self, name: str) -> None:
        text = (SLURM / f"{name}.slurm").read_text()
        assert "#SBATCH --ntasks-per-node=1 " in text
        assert "#SBATCH --signal=TERM@300 " in text  # to the tasks: B: would tell the shell alone

    def test_can_be_read_at_once(self, name: str) -> None:
        lines = (SLURM / f"{name}.slurm").read_text().splitlines()
        assert len(lines) <= 80
        assert max(map(len, lines)) <= 100


class TestRun:
    def test_words_go_on_as_they_are(self, job: Job) -> None:
        words = ["--factory", "llama31_8b", "log.name=a b", 'x="$HOME"', ""]
        done = job.run(*words)
        assert done.returncode == 0, done.stderr
        singularity = str(job.programs / "singularity")
        start = job.srun.index(singularity)
        assert job.srun[start:] == [singularity, "run", "--nv", "lora.sif", *words]
        assert "--cpus-per-task=32" in job.srun[:start]  # srun does not take it from the job
        assert done.stdout.count("job 7 ") == 2  # begin and end, with their times

    def test_the_first_to_end_kills_nobody(self, job: Job) -> None:
        """Nodes that were told to stop may save for different times; none may wait forever."""
        job.run()
        assert "--kill-on-bad-exit=0" in job.srun
        assert any(word.startswith("--wait=") for word in job.srun)

    def test_apptainer_by_its_name(self, job: Job) -> None:
        (job.programs / "singularity").unlink()
        job.add("apptainer")
        assert job.run().returncode == 0
        assert str(job.programs / "apptainer") in job.srun

    @pytest.mark.parametrize("name", ["singularity", "apptainer"])
    def test_a_module_where_it_is_not_on_the_path(self, job: Job, name: str) -> None:
        (job.programs / "singularity").unlink()
        job.add(name, where="modules")
        module = (
            f'() {{ echo "module $*" >>"$OUT/calls"; [ "$2" = {name} ] || return 1; '
            f"PATH=$PATH:{job.folder}/modules; }}"
        )
        done = job.run(**{"BASH_FUNC_module%%": module})
        assert done.returncode == 0, done.stderr
        assert f"module load {name}" in job.calls
        assert str(job.folder / "modules" / name) in job.srun

    def test_no_module_is_loaded_without_need(self, job: Job) -> None:
        job.run(**{"BASH_FUNC_module%%": '() { echo "module $*" >>"$OUT/calls"; }'})
        assert not [call for call in job.calls if call.startswith("module")]

    def test_neither_program_nor_module(self, job: Job) -> None:
        (job.programs / "singularity").unlink()
        done = job.run()
        assert done.returncode == 2
        assert done.stderr.startswith("error: no singularity or apptainer on PATH")
        assert "hint: module load NAME" in done.stderr
        assert "#!/bin/bash -l" in done.stderr

    def test_what_the_module_says(self, job: Job) -> None:
        (job.programs / "singularity").unlink()
        done = job.run(**{"BASH_FUNC_module%%": '() { echo "load gcc first" >&2; return 1; }'})
        assert done.returncode == 2
        assert done.stderr.count("load gcc first") == 1

    def test_missing_image(self, job: Job) -> None:
        (job.folder / "project" / "lora.sif").unlink()
        done = job.run()
        assert done.returncode == 2
        assert f"error: no image lora.sif on {os.uname().nodename}, in {job.folder}" in done.stderr
        assert "hint: LORA_SIF=/path/to/lora.sif sbatch" in done.stderr
        assert not (job.folder / "words").exists()

    def test_image_and_caches_elsewhere(self, job: Job) -> None:
        image, caches = job.folder / "my images" / "x.sif", job.folder / "caches of mine"
        image.parent.mkdir()
        image.touch()
        job.run(LORA_SIF=str(image), LORA_CACHE_DIR=str(caches))
        assert job.srun[-3:] == ["--nv", f"--bind={caches}", str(image)]
        assert caches.is_dir()  # binding one that is not there fails

    def test_caches_by_a_relative_path(self, job: Job) -> None:
        job.run(LORA_CACHE_DIR="../caches")
        assert f"--bind={job.folder}/caches" in job.srun
        assert f"LORA_CACHE_DIR={job.folder}/caches" in job.seen

    def test_caches_on_each_node(self, job: Job) -> None:
        job.run(LORA_CACHE_DIR="caches", SLURM_JOB_NUM_NODES="2")
        assert f"srun mkdir -p {job.folder}/project/caches" in job.calls

    @pytest.mark.parametrize("nodes", ["1", "2"])
    def test_caches_that_cannot_be(self, job: Job, nodes: str) -> None:
        done = job.run(LORA_CACHE_DIR="/dev/null/x", SLURM_JOB_NUM_NODES=nodes)
        assert done.returncode == 2
        assert "error: LORA_CACHE_DIR=/dev/null/x: no such folder can be made\n" in done.stderr
        assert "hint: " in done.stderr

    def test_further_folders(self, job: Job, tmp_path: Path) -> None:
        written = tmp_path / "job.slurm"
        binds = [Path("/scratch"), Path("/my data")]
        written.write_text(dataclasses.replace(SCRIPTS["single_gpu"], binds=binds).text())
        job.run(script=written)
        assert job.srun[-4:] == ["--nv", "--bind=/scratch", "--bind=/my data", "lora.sif"]


class TestEnd:
    """When the job ends, and what it does then."""

    def test_the_run_learns_the_jobs_end(self, job: Job) -> None:
        job.run(SLURM_TIME_FORMAT="relative")
        assert "SLURM_JOB_END_TIME=1893553445" in job.seen

    @pytest.mark.parametrize("answer", ["", "N/A", "NONE", "Unknown"])
    def test_an_unknown_end_is_not_told(self, job: Job, answer: str) -> None:
        job.run(END=answer)
        assert not [each for each in job.seen if each.startswith("SLURM_JOB_END_TIME")]
        job.run(END=answer, SLURM_JOB_END_TIME="1893553445")  # Slurm's own
        assert "SLURM_JOB_END_TIME=1893553445" in job.seen

    @pytest.mark.parametrize(("left", "warns"), [(300, True), (3600, False)])
    def test_a_job_that_is_told_to_stop_at_once(self, job: Job, left: int, warns: bool) -> None:
        done = job.run(END=str(int(time.time()) + left))
        assert ("sbatch --signal=TERM@60" in done.stderr) == warns
        assert done.returncode == 0

    @pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
    def test_status_is_the_runs(self, job: Job, status: int) -> None:
        done = job.run(STATUS=str(status))
        assert done.returncode == status
        assert f"exit status {status}\n" in done.stdout
        assert "scontrol requeue 7" not in job.calls

    def test_saved_and_queued_again(self, job: Job) -> None:
        assert job.run(STATUS="85").returncode == 85
        assert job.calls[-1] == "scontrol requeue 7"

    def test_one_task_of_an_array(self, job: Job) -> None:
        """The last one has the number of the array, by which Slurm would requeue all."""
        job.run(STATUS="85", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
        assert "squeue -h -j 7_3 -o %e" in job.calls
        assert job.calls[-1] == "scontrol requeue 7_3"
        job.run(STATUS="85", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
        assert job.calls[-1] == "scontrol requeue 7"

    @pytest.mark.parametrize(
        ("reason", "preempted"), [("TimeLimit", "None"), ("None", "1893550001")]
    )
    def test_saved_as_slurm_ended_it(self, job: Job, reason: str, preempted: str) -> None:
        state = f"JobState=COMPLETING Reason={reason}"
        assert job.run(STATUS="85", STATE=state, PREEMPTED=preempted, STOP="1").returncode == 85
        assert job.calls[-1] == "scontrol requeue 7"

    def test_preempted_without_resume_requeue(self, job: Job) -> None:
        """Its script ends within the grace time, after which Slurm would have queued it again."""
        assert job.run(STATUS="75", PREEMPTED="1893550001", STOP="1").returncode == 75
        assert job.calls[-1] == "scontrol requeue 7"

    def test_slurm_is_busy(self, job: Job) -> None:
        done = job.run(STATUS="85", BUSY="3")
        assert (done.returncode, done.stderr) == (85, "")
        assert job.calls[-1] == "scontrol requeue 7"
        assert job.calls.count("sleep 20") == 3

    def test_slurm_stays_busy(self, job: Job) -> None:
        done = job.run(STATUS="85", BUSY="100")
        assert done.returncode == 85
        assert "error: job 7 is not queued again\nhint: give the same sbatch" in done.stderr

    @pytest.mark.parametrize("option", ["-e", "-u", "-eo pipefail"])
    def test_a_stricter_shell(self, job: Job, tmp_path: Path, option: str) -> None:
        lines = SCRIPTS["multi_gpu"].text().splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        written = tmp_path / "job.slurm"
        written.write_text("\n".join([*lines[:end], f"set {option}", *lines[end:], ""]))
        job.add("squeue", "exit 1")
        (job.programs / "singularity").unlink()
        job.add("apptainer", where="modules")
        module = f'() {{ [ "$2" = apptainer ] && PATH=$PATH:{job.folder}/modules; }}'
        done = job.run(script=written, STATUS="85", BUSY="1", **{"BASH_FUNC_module%%": module})
        assert (done.returncode, done.stderr) == (85, "")
        assert job.calls[-1] == "scontrol requeue 7"

    def test_cancelled_stays_cancelled(self, job: Job) -> None:
        """`scontrol requeue` brings back a job that scancel is ending."""
        state = "JobState=COMPLETING Reason=None"
        assert job.run(STATUS="85", STATE=state, STOP="1").returncode == 85
        assert "scontrol requeue 7" not in job.calls

    def test_a_signal_to_the_script_waits_for_the_run(self, job: Job) -> None:
        done = job.run(STATUS="75", STOP="1")
        assert done.returncode == 75
        assert "exit status 75\n" in done.stdout


class TestInstallation:
    def test_without_an_image(self, job: Job, tmp_path: Path) -> None:
        program = tmp_path / "a venv" / "lora-train"
        text = JobScript(
            introduction=["Written by a test"],
            cpus_per_node=8,
            memory_per_node="60G",
            seconds=60,
            program=program,
            words=["--factory", "llama31_8b", "log.name=it's"],
        ).text()
        written = tmp_path / "job.slurm"
        written.write_text(text)
        (job.programs / "singularity").unlink()
        assert job.run("--max-steps", "3", script=written).returncode == 0
        assert job.srun[-6:] == [
            str(program), "--factory", "llama31_8b", "log.name=it's", "--max-steps", "3",
        ]  # fmt: skip
        assert "#SBATCH --signal=TERM@15 " in text  # a short job is not told before it begins


if __name__ == "__main__":
    SLURM.mkdir(exist_ok=True)
    for name, each in SCRIPTS.items():
        (SLURM / f"{name}.slurm").write_text(each.text())
