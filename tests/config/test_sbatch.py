"""`lora-train sbatch` on clusters that answer as real ones do."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_train.cli import main
from lora_train.commands import sbatch
from lora_train.commands.cluster import parse_time, read_cluster
from lora_train.commands.job_script import format_time
from lora_train.errors import UserError

# partition, GRES, features, nodes, MB, CPUs, limit, availability, state
PLAIN = """\
gpu*|gpu:a100:4(S:0-1)|a100,ib|3|515000|64|1-00:00:00|up|idle
gpu*|gpu:v100:8(S:0,1)|v100|5|380000|40|1-00:00:00|up|idle
long|gpu:a100:4(S:0-1)|a100,ib|2|515000|64|7-00:00:00|up|idle
cpu|(null)|(null)|100|250000|128|infinite|up|idle
"""
MIXED = """\
batch*|(null)|intel|200|190000|40|4-00:00:00|up|idle
debug|gpu:a100:2|amd,a100|1|250000|32|30:00|up|idle
old|gpu:p100:4(S:0-1),nvme:1|p100|4|120000|28|infinite|up|idle
ampere|gpu:a100:4(S:0-1)|amd,a100|4|1031000+|128|3-00:00:00|up|idle
mig|gpu:a100:2(S:0),gpu:1g.10gb:7(S:1)|amd,mig|2|515000|64|1-00:00:00|up|idle
closed|gpu:h100:8|h100|2|2000000|192|infinite|down|idle
"""
UNTYPED = """\
gpu*|gpu:4|skylake,v100_32|8|380000|40|2-00:00:00|up|idle
gpu*|gpu:4(IDX:N/A)|rome,A100_80|4|500000|48|2-00:00:00|up|idle
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an image, on a machine without Slurm."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "LORA_", "APPTAINER_", "SINGULARITY_", "CUDA_")):
            monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "lora.sif").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    # the machine that tests may have a real one
    add(tmp_path, "sinfo", "exit 1")
    add(tmp_path, "sbatch", "exit 1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(folder: Path, name: str, body: str) -> None:
    file = folder / "bin" / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def on(folder: Path, rows: str) -> None:
    """Have the cluster answer so."""
    (folder / "rows").write_text(rows)
    add(folder, "sinfo", f'[ "$1" = -h ] && cat {folder}/rows')


class Printed:
    """The script that words print."""

    def __init__(self, text: str, notes: str) -> None:
        self.text, self.notes = text, notes
        lines = [line.split("#", 2)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
        options = [line.removeprefix("SBATCH --").strip().partition("=") for line in lines]
        self.options = {name: value for name, _, value in options}

    def __getitem__(self, option: str) -> str | None:
        return self.options.get(option)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    def printed(*argv: str) -> Printed:
        assert sbatch.run(list(argv)) == 0
        out, errors = capsys.readouterr()
        return Printed(out, errors)

    return printed


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        sbatch.run(list(argv))
    assert caught.value.hint
    return str(caught.value)


class TestShape:
    def test_one_gpu(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        script = printed()
        assert (script["nodes"], script["ntasks-per-node"]) == ("1", "1")
        assert script["gpus-per-node"] == "a100:1"  # the partition has V100s, too
        assert (script["cpus-per-task"], script["mem"]) == ("8", "60G")
        assert script["partition"] is None  # the default one
        assert script["time"] == "2:00:00"

    def test_spreads_over_nodes(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        script = printed("--gpus", "8")
        assert (script["nodes"], script["gpus-per-node"]) == ("2", "a100:4")
        assert (script["cpus-per-task"], script["mem"]) == ("32", "240G")
        assert "8 GPUs: 2 nodes with 4 each, a100, in partition gpu" in script.notes

    def test_as_many_on_each_node(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        assert printed("--gpus", "6")["nodes"] == "2"
        assert printed("--gpus", "2", "--nodes", "2")["gpus-per-node"] == "a100:1"
        problem = refused("--gpus", "7")
        assert "gpu: 3 nodes with 4 each; a100 in partition long: 2 nodes with 4 each" in problem
        assert "--gpus 6 (2 nodes with 3 each) or --gpus 8 (2 nodes with 4 each)" in problem

    def test_more_than_there_are(self, folder: Path) -> None:
        on(folder, PLAIN)
        assert "hint: --gpus 12 (3 nodes with 4 each)" in refused("--gpus", "16")
        assert "hint: --nodes 3, or fewer" in refused("--gpus", "4", "--nodes", "4")

    def test_a_share_of_a_small_node(self, folder: Path, printed) -> None:
        """Never more than the node has, and a GPU's share of it at most."""
        on(folder, "gpu*|gpu:a100:8|a100|1|256000|32|infinite|up|idle\n")
        one, all_of_it = printed(), printed("--gpus", "8")
        assert (one["cpus-per-task"], one["mem"]) == ("4", "29G")
        assert (all_of_it["cpus-per-task"], all_of_it["mem"]) == ("32", "237G")

    def test_memory_that_no_node_has(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        assert printed("--mem", "500G")["mem"] == "500G"
        problem = refused("--mem", "1T")
        assert "--mem=1T: the nodes with a100 have 502G" in problem
        assert "hint: --mem=477G" in problem

    def test_memory_that_slurm_was_not_told(self, folder: Path, printed) -> None:
        on(folder, "gpu*|gpu:h100:8|(null)|2|1|192|infinite|up|idle\n")
        script = printed()
        assert script["mem"] is None
        assert "--mem is left to Slurm" in script.notes
        assert printed("--mem", "100G")["mem"] == "100G"

    def test_nodes_that_are_drained_or_down(self, folder: Path, printed) -> None:
        states = ["drained*", "idle~", "down", "mixed", "maint"]
        on(folder, "".join(f"gpu*|gpu:h100:8|h|1|1000000|96|infinite|up|{x}\n" for x in states))
        assert "down" not in printed("--gpus", "16").notes
        script = printed("--gpus", "24")
        assert script["nodes"] == "3"
        assert "nodes that are down or drained now: the job waits" in script.notes
        assert "--gpus 40 (5 nodes with 8 each)" in refused("--gpus", "48")

    def test_drained_old_gpus_may_come_back(self, folder: Path, printed) -> None:
        on(folder, PLAIN.replace("40|1-00:00:00|up|idle", "40|1-00:00:00|up|drained"))
        assert printed()["gpus-per-node"] == "a100:1"

    def test_a_cluster_of_many_nodes(self, folder: Path) -> None:
        on(folder, "gpu*|gpu:h100:8|(null)|5000|2000000|192|infinite|up|idle\n")
        assert "--gpus 40000 (5000 nodes with 8 each)" in refused("--gpus", "50000")


class TestKind:
    def test_old_gpus_are_avoided(self, folder: Path, printed) -> None:
        on(folder, MIXED)
        assert printed("--gpus", "4")["partition"] == "ampere"
        problem = refused("--gpus", "4", "--partition", "old")
        assert "p100: the kernels and bf16 need compute capability 8.0" in problem
        assert "hint: --gpus a100:4 --partition debug" in problem
        assert "v100: " in refused("--gpus", "v100:4", "--sinfo", str(_file(folder, PLAIN)))

    def test_old_gpus_for_a_run_that_goes_without(self, folder: Path, printed) -> None:
        on(folder, MIXED)
        words = ["trainer.precision=fp32", "kernels.fused=off"]
        assert printed("--gpus", "p100:1", "--", *words)["gpus-per-node"] == "p100:1"

    def test_not_for_half_an_hour_by_itself(self, folder: Path, printed) -> None:
        on(folder, MIXED)
        assert printed()["partition"] == "ampere"
        script = printed("--partition", "debug")
        assert (script["partition"], script["time"]) == ("debug", "0:30:00")

    def test_by_feature_where_gres_has_no_types(self, folder: Path, printed) -> None:
        on(folder, UNTYPED)
        for argv in (["--gpus", "4"], ["--gpus", "a100:4"]):
            script = printed(*argv)
            assert (script["gpus-per-node"], script["constraint"]) == ("4", "A100_80")
        assert printed("--constraint", "rome")["constraint"] == "rome"

    @pytest.mark.parametrize("kind", ["", "a100:"])
    def test_one_of_two_kinds_by_feature(self, folder: Path, printed, kind: str) -> None:
        rows = [
            f"gpu*|gpu:{kind}4|ib,a100,a100_{size}gb|2|500000|48|infinite|up|idle\n"
            for size in (40, 80)
        ]
        on(folder, "".join(rows))
        script = printed("--gpus", "a100_80gb:4")
        assert (script["gpus-per-node"], script["constraint"]) == (f"{kind}4", "a100_80gb")
        script = printed("--gpus", "a100_80gb:4", "--constraint", "ib")
        assert script["constraint"] == "ib&a100_80gb"
        assert printed("--gpus", "a100:4")["constraint"] == (None if kind else "a100")

    def test_not_consumed(self) -> None:
        (group,) = read_cluster("p|gpu:a100:no_consume:4|(null)|1|1|1|1:00|up|idle")
        assert (group.kind, group.gpus) == ("a100", 4)

    def test_unknown_gpus_are_taken_with_a_note(self, folder: Path, printed) -> None:
        on(folder, "gpu*|gpu:6|(null)|5|1000000|96|infinite|up|idle\n")
        script = printed("--gpus", "6")
        assert (script["gpus-per-node"], script["constraint"]) == ("6", None)
        assert "compute capability 8.0 (A100) or newer is not known here" in script.notes

    def test_known_before_unknown(self, folder: Path, printed) -> None:
        on(
            folder,
            "a*|gpu:x:4|(null)|5|1|1|infinite|up|idle\nb|gpu:h200:4|(null)|5|1|1|infinite|up|idle\n",
        )
        assert printed()["partition"] == "b"

    def test_parts_of_gpus_only_by_name(self, folder: Path, printed) -> None:
        on(folder, MIXED)
        assert printed("--partition", "mig")["gpus-per-node"] == "a100:1"
        script = printed("--gpus", "1g.10gb:1")
        assert (script["partition"], script["gpus-per-node"]) == ("mig", "1g.10gb:1")
        assert "cannot work on one run together" in refused("--gpus", "1g.10gb:2")

    def test_a_partition_that_is_down(self, folder: Path) -> None:
        on(folder, MIXED)
        assert "partition closed is not up" in refused("--partition", "closed")
        assert "no GPU h100" in refused("--gpus", "h100:1")

    @pytest.mark.parametrize(
        ("gres", "age"),
        [
            ("gpu:nvidia_a100-sxm4-80gb:4", "new"),
            ("gpu:a100_1g.5gb:7", "new"),
            ("gpu:nvidia_h100_80gb_hbm3:8", "new"),
            ("gpu:rtx_6000_ada:4", "new"),
            ("gpu:rtx3090:4", "new"),
            ("gpu:geforce_rtx_4090:4", "new"),
            ("gpu:l40s:4", "new"),
            ("gpu:gh200:1", "new"),
            ("gpu:tesla_v100-sxm2-32gb:4", "old"),
            ("gpu:quadro_rtx_8000:4", "old"),
            ("gpu:rtx_6000:4", "old"),
            ("gpu:rtx2080ti:8", "old"),
            ("gpu:gtx1080ti:8", "old"),
            ("gpu:t4:1", "old"),
            ("gpu:mi250x:8", "old"),
            ("gpu:tesla:4", "unknown"),
            ("gpu", "unknown"),
        ],
    )
    def test_age_by_name(self, gres: str, age: str) -> None:
        assert read_cluster(f"p|{gres}|(null)|1|1|1|1:00|up|idle")[0].age == age


class TestTime:
    def test_a_partition_that_allows_it(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        assert printed("--time", "1-00")["partition"] is None
        script = printed("--time", "2-12")
        assert (script["partition"], script["time"]) == ("long", "2-12:00:00")

    def test_longer_than_all_allow(self, folder: Path) -> None:
        on(folder, PLAIN)
        assert "hint: --time=7-00:00:00; with --requeue" in refused("--time", "8-0")
        assert "--time=1-00:00:00;" in refused("--time", "2-0", "--partition", "gpu")

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("90", 5400), ("2:30", 150), ("2:00:00", 7200), ("1-12", 129600),
            ("1-2:30", 95400), ("1-02:03:04", 93784),
        ],
    )  # fmt: skip
    def test_as_sbatch_reads_it(self, text: str, seconds: int) -> None:
        assert parse_time(text) == seconds
        assert parse_time(format_time(seconds)) == seconds

    @pytest.mark.parametrize("text", ["2h", "", "1:2:3:4", "-5", "0", "1-"])
    def test_what_is_no_time(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            sbatch.run([f"--time={text}"])
        assert ended.value.code == 2
        assert "2:00:00" in capsys.readouterr().err

    def test_two_minutes_are_told(self, printed) -> None:
        script = printed("--time", "2:00")
        assert "warning: --time 2:00 is 2 minutes" in script.notes
        assert script["signal"] == "TERM@30"


class TestWords:
    """What stands behind --."""

    def test_are_in_the_script(self, folder: Path, printed) -> None:
        words = ["--factory", "llama31_8b", "log.name=x y"]
        script = printed("--gpus", "4", "--", *words)
        assert "--factory llama31_8b 'log.name=x y' \"$@\" || status=$?\n" in script.text
        assert f"LORA_SIF={folder}/lora.sif\n" in script.text
        assert printed("--", "train", *words).text.count(" train ") == 1  # in the first comment

    def test_a_mistake_costs_no_queue_time(self) -> None:
        assert "did you mean `trainer.max_steps`" in refused("--", "--max-stepz", "3")

    def test_the_batch_must_divide(self, folder: Path) -> None:
        on(folder, PLAIN)
        problem = refused("--gpus", "8", "--", "data.global_batch_size=12")
        assert "does not divide into micro-batches of 1 on 8 processes" in problem

    def test_devices_of_the_run_and_of_the_job(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        words = ["data.global_batch_size=16", "trainer.devices=4", "trainer.num_nodes=2"]
        assert printed("--gpus", "8", "--", *words)["nodes"] == "2"
        assert "--gpus 8 --nodes 2" in refused("--gpus", "4", "--", *words)

    def test_name_of_the_run(self, printed) -> None:
        assert printed("--name", "x", "--", "log.name=my run")["job-name"] == "x"
        assert printed("--", "log.name=my run #2")["job-name"] == "my_run_2"

    @pytest.mark.parametrize(
        "key", ["model.path", "data.path", "data.validation_path", "model.chat_template"]
    )
    def test_a_file_that_is_not_there(
        self, folder: Path, printed, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        word = f"{key}={folder}/nowhere/x"
        problem = refused("--", word)
        assert f"{word}: there is no such file or folder on {os.uname().nodename}" in problem
        assert f"hint: ls {folder} " in problem
        monkeypatch.setenv("APPTAINER_CONTAINER", "/x/lora.sif")
        assert (
            f"note: {word}: there is no such file or folder in this cont"
            in printed("--", word).notes
        )

    def test_folders_that_the_container_must_show(
        self, folder: Path, printed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "here").mkdir()
        monkeypatch.chdir(folder / "here")
        for name in ("home", "away"):
            (folder / name).mkdir()
            (folder / name / "x.jsonl").touch()
        monkeypatch.setenv("HOME", str(folder / "home"))
        sif = ["--sif", f"{folder}/lora.sif"]
        assert " --bind=" not in _start(printed(*sif, "--", f"data.path={folder}/home/x.jsonl"))
        start = _start(printed(*sif, "--", f"data.path={folder}/away/x.jsonl"))
        first = Path(*folder.parts[:2])  # of pytest, /tmp or not
        shown = folder / "away" if first.name in ("tmp", "var") else first
        assert f' --bind={shown} "$LORA_SIF"' in start
        monkeypatch.setattr("lora_train.commands.job_paths._OF_THE_IMAGE", ())
        start = _start(printed(*sif, "--", f"data.path={folder}/away/x.jsonl"))
        assert f' --bind={first} "$LORA_SIF"' in start

    def test_nemo(self, printed) -> None:
        words = ["nemo", "llm", "finetune", "--factory", "llama31_8b"]
        assert f'{" ".join(words)} "$@"' in printed("--", *words).text
        assert "--tail" in refused("--", *words, "--tail")

    def test_requeue_is_seen_in_them(self, printed) -> None:
        words = ["--factory", "llama31_8b"]
        added = 'llama31_8b resume.requeue=true "$@"'
        assert added not in printed("--", *words).text
        assert added in printed("--requeue", "--", *words).text
        assert "given twice" in refused("--requeue", "--", "resume.requeue=false")

    def test_forgotten_dashes(self) -> None:
        problem = refused("--gpus", "4", "--factory", "llama31_8b")
        assert "lora-train sbatch --gpus 4 -- --factory llama31_8b" in problem

    def test_what_would_end_a_comment(self) -> None:
        assert "line break" in refused("--", "log.name=a\nrm -rf x")
        with pytest.raises(SystemExit):
            sbatch.run(["--name", "a b"])


class TestWithoutSlurm:
    def test_a_guess_with_a_note(self, printed) -> None:
        script = printed("--gpus", "a100:4", "--partition", "p", "--account", "me")
        assert (script["nodes"], script["gpus-per-node"]) == ("1", "a100:4")
        assert (script["partition"], script["account"]) == ("p", "me")
        assert "no answer from sinfo" in script.notes

    def test_more_than_a_node_has(self, printed) -> None:
        assert "--nodes 4 where a node has 4" in refused("--gpus", "16")
        assert printed("--gpus", "16", "--nodes", "4")["gpus-per-node"] == "4"
        assert "--gpus 4 --nodes 2" in refused("--gpus", "5", "--nodes", "2")

    def test_in_a_container(self, printed, monkeypatch: pytest.MonkeyPatch) -> None:
        """It names the line that brings Slurm's answer in, and takes that answer."""
        monkeypatch.setenv("APPTAINER_CONTAINER", "/project/my images/lora.sif")
        script = printed("--gpus", "8")
        line = next(line for line in script.notes.splitlines() if " | singularity run " in line)
        ask, start = line.strip().split(" | singularity run ")
        assert ask == "sinfo -h -e -o '%P|%G|%f|%D|%m|%c|%l|%a|%T'"
        assert start == "'/project/my images/lora.sif' sbatch --sinfo - --gpus 8"
        assert "LORA_SIF='/project/my images/lora.sif'\n" in script.text
        monkeypatch.setattr(sys, "stdin", io.StringIO(PLAIN))
        assert printed("--sinfo", "-", "--gpus", "8")["nodes"] == "2"

    def test_submitting_from_a_container(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("APPTAINER_CONTAINER", "/x/lora.sif")
        problem = refused("--submit", "--gpus", "4", "--", "--factory", "llama31_8b")
        line = "singularity run /x/lora.sif sbatch --gpus 4 -- --factory llama31_8b | sbatch"
        assert f"hint: {line}" in problem

    def test_submitting_without_sbatch(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "bin" / "sbatch").unlink()
        monkeypatch.setenv("PATH", str(folder / "bin"))
        assert "there is no sbatch" in refused("--submit")

    def test_no_image_is_this_installation(self, folder: Path, printed) -> None:
        (folder / "lora.sif").unlink()
        script = printed()
        program = Path(sys.executable).with_name("lora-train")
        assert f"  {program} \\\n" in script.text
        assert "singularity" not in script.text.replace("sbatch", "")
        assert f"the job starts {program}" in script.notes
        assert "no such file" in refused("--sif", "lora.sif")

    def test_image_of_the_environment(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORA_SIF", f"{folder}/other.sif")
        assert f"LORA_SIF={folder}/other.sif: there is no such file" in refused()

    def test_output_into_a_folder_that_is_not_there(self, folder: Path, printed) -> None:
        assert "hint: mkdir -p logs" in refused("--output", "logs/%j.out")
        (folder / "logs").mkdir()
        assert printed("--output", "logs/%j.out")["output"] == "logs/%j.out"
        assert printed("--output", "x/%u/%j.out")["output"] == "x/%u/%j.out"

    def test_rows_that_are_none(self, folder: Path) -> None:
        assert "9 fields" in refused("--sinfo", str(_file(folder, "PARTITION AVAIL TIMELIMIT")))
        assert "--sinfo nowhere" in refused("--sinfo", "nowhere")
        assert "no GPU on this cluster" in refused("--sinfo", str(_file(folder, "")))


class TestSubmit:
    def test_prints_the_number_alone(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        on(folder, PLAIN)
        add(folder, "sbatch", f'echo "$*" >{folder}/words; cat >{folder}/job; echo "42;cluster"')
        assert main(["sbatch", "--submit", "--gpus", "4", "--", "--factory", "llama31_8b"]) == 0
        out, errors = capsys.readouterr()
        assert out == "42\n"
        assert "scontrol write batch_script 42" in errors
        assert (folder / "words").read_text() == "--parsable\n"
        assert "#SBATCH --gpus-per-node=a100:4 " in (folder / "job").read_text()

    def test_a_site_that_says_more(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        add(folder, "sbatch", "echo 'Welcome to node 3'; echo 'charged to x' >&2; echo 42")
        assert main(["sbatch", "--submit"]) == 0
        out, errors = capsys.readouterr()
        assert out == "42\n"
        assert "note: Slurm: charged to x\n" in errors

    def test_slurm_says_no(self, folder: Path) -> None:
        add(folder, "sbatch", 'echo "sbatch: error: invalid account" >&2; exit 1')
        assert "Slurm did not take the job: sbatch: error: invalid account" in refused("--submit")

    def test_verdict_before(self, folder: Path, printed) -> None:
        on(folder, PLAIN)
        add(folder, "sbatch", '[ "$1" = --test-only ] && echo "sbatch: Job 3 to start at X" >&2')
        assert "note: Slurm: Job 3 to start at X" in printed().notes
        add(folder, "sbatch", "echo 'allocation failure: Invalid account' >&2; exit 1")
        script = printed()
        assert "warning: Slurm would not take this script: allocation failure" in script.notes
        assert script["nodes"] == "1"  # printed nevertheless: the account may be set later


def test_the_script_is_good_shell(folder: Path, printed) -> None:
    on(folder, PLAIN)
    words = ["--factory", "llama31_8b", "log.name=it's & mine"]
    text = printed("--gpus", "8", "--constraint", "ib", "--requeue", "--", *words).text
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("needs shellcheck")
    done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sbatch.run(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "lora-train sbatch --gpus 4 --time 8:00:00 -- --factory llama31_8b" in text
    assert "%x-%j.out" in text


def _file(folder: Path, text: str) -> Path:
    file = folder / "sinfo.txt"
    file.write_text(text)
    return file


def _start(script: Printed) -> str:
    """The line that starts the container."""
    return next(line for line in script.text.splitlines() if " run --nv " in line)
