"""NeMo's command line runs the trainer, or is refused with the line that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_train.cli import main, parse_command_line
from lora_train.commands.nemo import translate
from lora_train.config import Config
from lora_train.config_loading import read_yaml
from lora_train.errors import UserError

FINETUNE = ["llm", "finetune"]
WORKSHOP = [
    *FINETUNE, "--factory", "llama31_8b", "trainer.devices=auto", "trainer.max_steps=250",
    "data.global_batch_size=8", "optim.lr_scheduler.warmup_steps=50",
]  # fmt: skip


def config_of(*words: str) -> Config:
    """What the words after `nemo llm finetune` resolve to."""
    return parse_command_line(translate([*FINETUNE, *words])).resolve()


def refused(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        translate(words)
    return caught.value


class TestFinetune:
    def test_the_workshops_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        assert main(["nemo", *WORKSHOP, "--dryrun", "-y"]) == 0
        output = capsys.readouterr()
        assert output.err == (
            "this is lora-train, not NVIDIA NeMo: recipe llama31_8b_nemo, with the numbers of "
            "NeMo's llama31_8b; the adapter comes in PEFT format\n"
            "the same: lora-train --factory llama31_8b_nemo --dry-run trainer.devices=auto "
            "trainer.max_steps=250 data.global_batch_size=8 optim.lr_scheduler.warmup_steps=50\n"
        )
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(output.out)
        found = read_yaml(resolved)
        assert (found["trainer"]["max_steps"], found["data"]["global_batch_size"]) == (250, 8)
        assert (found["peft"]["dim"], found["optim"]["betas"]) == (8, [0.9, 0.98])

    def test_one_process_of_several_introduces_itself(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        assert main(["nemo", *WORKSHOP, "--dryrun"]) == 0
        assert "NeMo" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words", [["-f", "llama31_8b"], ["--factory=llama31_8b_nemo"], ["-f=llama31_8b()"]]
    )
    def test_names_of_the_recipe(self, words: list[str]) -> None:
        assert config_of(*words) == config_of("--factory", "llama31_8b")

    def test_arguments_of_the_recipe(self) -> None:
        config = config_of(
            "--factory",
            "llama31_8b(num_nodes=2, num_gpus_per_node=4, seq_length=1024, name='mine', "
            "dir='/big disk', peft_scheme='lora', performance_mode=False)",
        )
        assert (config.trainer.num_nodes, config.trainer.devices) == (2, 4)
        assert (config.data.seq_length, config.data.packed_sequence) == (1024, False)
        assert (config.log.name, config.log.log_dir) == ("mine", "/big disk")

    @pytest.mark.parametrize("word", ["True", "true"])
    def test_packing_changes_what_it_changes_in_nemo(self, word: str) -> None:
        data = config_of("-f", f"llama31_8b(packed_sequence={word})").data
        assert (data.packed_sequence, data.seq_length, data.global_batch_size) == (True, 4096, 8)
        data = config_of("-f", f"llama31_8b(seq_length=512, packed_sequence={word})").data
        assert (data.packed_sequence, data.seq_length, data.global_batch_size) == (True, 512, 8)

    def test_arguments_that_say_nothing(self) -> None:
        plain = config_of("-f", "llama31_8b")
        assert config_of("-f", "llama31_8b(seq_length=None, packed_sequence=None)") == plain

    def test_a_key_wins_over_the_recipes_argument(self) -> None:
        config = config_of("-f", "llama31_8b(num_gpus_per_node=8, name=one)", "trainer.devices=2")
        assert (config.trainer.devices, config.log.name) == (2, "one")
        assert config_of("-f", "llama31_8b(name=one)", "-n", "two").log.name == "two"


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (["--max-steps=3"], "--max-steps=3: unknown option; a key is set as KEY=VALUE"),
            (["--bogus"], "--bogus: unknown option; a key is set as KEY=VALUE"),
            (["--yes=no"], "--yes=no: unknown option; a key is set as KEY=VALUE"),
            (["--to-yaml", "o.yaml"], "--to-yaml: `--dryrun > FILE` writes the resolved"),
            (["--name"], "--name: needs a value"),
            (["-f", "llama31_8b"], "--factory: given twice (llama31_8b, llama31_8b)"),
        ],
    )
    def test_options(self, words: list[str], problem: str) -> None:
        error = refused(*FINETUNE, "--factory", "llama31_8b", *words)
        assert error.message.startswith(f"`nemo llm finetune`:\n  {problem}")

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ("peft_scheme='dora'", "peft_scheme=dora: only lora is here, adapted by the peft."),
            ("peft_scheme=None", "peft_scheme=None: only lora is here"),
            ("performance_mode=True", "performance_mode: adapts fewer layers; say so by peft."),
            ("tp=2", "tp: unknown argument; there are num_nodes, num_gpus_per_node, seq_length,"),
            ("2", "--factory llama31_8b(2): expected NAME(argument=value, ...), text in quotes"),
            ("dir=/x", "--factory llama31_8b(dir=/x): expected NAME(argument=value, ...)"),
        ],
    )
    def test_arguments(self, arguments: str, problem: str) -> None:
        error = refused(*FINETUNE, "--factory", f"llama31_8b({arguments})")
        assert f"\n  {problem}" in error.message

    def test_all_at_once(self) -> None:
        error = refused(*FINETUNE, "--bogus", "-f", "llama31_8b(tp=2)", "--detach")
        assert len(error.message.splitlines()) == 4

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("mistral_7b", "lora-train --factory mistral_7b optim.lr=1e-4"),
            ("llama31_70b", "lora-train --factory llama31_70b_qlora optim.lr=1e-4"),
            ("llama3_8b", "lora-train --factory llama31_8b_nemo model.path=FOLDER_OR_HUB_NAME "),
            ("@mine.yaml", "lora-train --factory llama31_8b_nemo model.path=FOLDER_OR_HUB_NAME"),
        ],
    )
    def test_other_recipes(self, name: str, line: str) -> None:
        error = refused(*FINETUNE, "--factory", name, "optim.lr=1e-4")
        assert "no such recipe" in error.message
        assert "there are: llama31_8b (here llama31_8b_nemo)" in error.message
        assert str(error.hint).startswith(line)

    def test_no_recipe(self) -> None:
        assert refused(*FINETUNE, "trainer.max_steps=1").message == "--factory is missing"

    def test_empty_device_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        """SLURM_GPUS_PER_NODE is unset in a job with --gres."""
        words = ["trainer.devices=" if "devices" in word else word for word in WORKSHOP]
        assert main(["nemo", *words]) == 2
        said = capsys.readouterr().err
        assert "trainer.devices: empty" in said
        assert "SLURM_GPUS_PER_NODE is set by --gpus-per-node only" in said
        assert "trainer.devices=auto takes" in said

    def test_keys_are_checked_as_ever(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["nemo", *WORKSHOP, "optim.config.lr=1e-3", "trainer.max_steps=1"]) == 2
        said = capsys.readouterr().err
        assert "optim.config.lr: unknown key (command line); did you mean `optim.lr`?" in said
        assert "trainer.max_steps: given twice (250, 1)" in said

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["llm", "pretrain", "-f", "llama31_8b"], "`nemo llm pretrain` is not here: this is"),
            (["llm", "import", "model=llama31_8b"], "`nemo llm import` is not needed: Hugging"),
            (["vlm"], "`nemo vlm` is not here: this is lora-train"),
        ],
    )
    def test_other_commands(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["nemo", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}")
        assert "hint: nemo llm finetune --factory llama31_8b" in said


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["llm", "--help"], 0),
        (["llm", "finetune", "-h"], 0),
        ([], 2),
        (["llm"], 2),
    ],
)
def test_help(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nemo", *words]) == status
    assert "usage: nemo llm finetune --factory llama31_8b" in capsys.readouterr().out
