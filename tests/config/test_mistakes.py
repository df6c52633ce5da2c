"""What a command line or a configuration file cannot say: messages word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_train.cli import parse_command_line
from lora_train.config import Config
from lora_train.errors import UserError


def config_of(*words: str) -> Config:
    return parse_command_line(words).resolve()


def problems_of(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config_of(*words)
    return caught.value.message.split("\n  ")[1:]


class TestTwoWaysToSayOneThing:
    """max_steps and max_epochs, warmup_steps and warmup_ratio: the later source decides."""

    def test_epochs_over_a_recipes_steps(self) -> None:
        trainer = config_of("--max-epochs", "3").trainer
        assert (trainer.max_steps, trainer.max_epochs) == (None, 3)
        scheduler = config_of("--factory", "llama31_8b_nemo", "--warmup-ratio", "0.1").optim
        assert scheduler.lr_scheduler.warmup_steps is None

    def test_file_over_recipe_and_command_line_over_file(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("trainer: {max_epochs: 2, max_steps: null}\n")
        words = ("--factory", "quickstart", "--config", str(file))
        assert config_of(*words).trainer.max_steps is None
        assert config_of(*words, "--max-steps", "7").trainer.max_steps == 7

    def test_both_at_once(self, tmp_path: Path) -> None:
        problem = "trainer.max_steps and trainer.max_epochs: both given ({}), only one can count"
        assert problems_of("--max-steps", "7", "--max-epochs", "1") == [
            problem.format("command line")
        ]
        file = tmp_path / "mine.yaml"
        file.write_text("trainer: {max_epochs: 2, max_steps: 7}\n")
        assert problems_of("--config", str(file)) == [problem.format(file)]
        assert config_of("trainer.max_steps=null", "trainer.max_epochs=2").trainer.max_epochs == 2


class TestMistakes:
    @pytest.mark.parametrize(
        ("word", "problem"),
        [
            ("trainer.seed=4294967296", "should be less than or equal to 4294967295; found"),
            ("optim.lr=inf", "should be a finite number; found 'inf'"),
            ("peft.alpha=1e400", "should be a finite number; found '1e400'"),
            ("peft.alpha_pattern={q: 1e400}", "should be a finite number; found"),
            ("optim.betas=[0.9, nan]", "should be a finite number; found"),
            ("trainer.max_epochs=inf", "should be a finite number; found 'inf'"),
            ("peft.target_modules=[]", "should be 'all-linear' or list should have at least 1"),
            ("model.path=null", "cannot be null (command line)"),
            ("model.path=", "string should have at least 1 character; found '' (command line)"),
            ("model.revision=", "string should have at least 1 character; found '' (command line)"),
            ("peft.target_modules=" + "[" * 5000, "should be "),
            ("peft.rank_pattern={[q]: 4}", "should be a valid dictionary; found '{[q]: 4}'"),
            ("peft.rank_pattern={[1]: 4}", "should be a valid dictionary; found '{[1]: 4}'"),
        ],
    )
    def test_values_out_of_bounds(self, word: str, problem: str) -> None:
        [found] = problems_of(word)
        assert found.startswith(f"{word.partition('=')[0]}: {problem}")

    def test_given_twice(self) -> None:
        words = ["peft.dim=4", "--dim", "8", "--factory", "qwen3_8b", "-f", "quickstart"]
        assert problems_of(*words) == [
            "peft.dim: given twice (4, 8)",
            "--factory: given twice (qwen3_8b, quickstart)",
        ]
        parsed = parse_command_line(["--config", "a.yaml", "--config=b.yaml"])
        assert parsed.problems == ["--config: given twice (a.yaml, b.yaml)"]

    def test_dry_run_takes_no_value(self) -> None:
        assert problems_of("--dry-run=false") == ["--dry-run=false: takes no value"]

    def test_all_at_once_with_the_nearest_names(self) -> None:
        assert problems_of(
            "trainer.max_stepz=3",
            "optim.lr=-1",
            "peft.dim=2.5",
            "--learning-rate",
            "3",
            "trainr.devices=2",
        ) == [
            "--learning-rate: unknown option; did you mean `optim.lr`?",
            "trainer.max_stepz: unknown key (command line); did you mean `trainer.max_steps`?",
            "trainr.devices: unknown key (command line); did you mean `trainer.devices`?",
            "peft.dim: should be a valid integer, unable to parse string as an integer; "
            "found '2.5' (command line)",
            "optim.lr: should be greater than 0; found '-1' (command line)",
        ]

    def test_an_ambiguous_last_name_lists_the_candidates(self) -> None:
        assert problems_of("--name", "x") == [
            "--name: several keys end so: optim.name, optim.lr_scheduler.name, log.name"
        ]

    def test_literal_lists_what_is_allowed(self) -> None:
        [problem] = problems_of("peft.init=svd")
        assert problem.startswith("peft.init: should be 'default', 'gaussian'")
        assert problem.endswith("found 'svd' (command line)")

    def test_a_boolean_is_not_a_number(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("peft:\n  dim: true\n")
        [problem] = problems_of("--config", str(file))
        assert problem.startswith("peft.dim: should be a valid integer")
        assert problem.endswith(f"found 'true' ({file})")

    def test_only_equals_sets(self) -> None:
        assert problems_of("trainer.max_steps+=3") == [
            "trainer.max_steps+=3: only `=` sets a key, found `+=`"
        ]

    def test_a_recipe_name_without_factory(self) -> None:
        assert problems_of("qwen3_8b") == [
            "qwen3_8b: expected KEY=VALUE or --option; did you mean `--factory qwen3_8b`?"
        ]

    def test_a_section_is_not_a_key(self) -> None:
        [problem] = problems_of("log.ckpt=3")
        assert problem == (
            "log.ckpt: a section, not a key (command line); its keys: "
            "log.ckpt.every_n_train_steps, log.ckpt.keep_last"
        )

    def test_missing_value(self) -> None:
        assert problems_of("--max-steps") == ["--max-steps: needs a value"]

    def test_required_keys(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("model: {revision: main}\ndata: {path: x}\n")
        assert problems_of("--config", str(file)) == ["model.path: required, and not given"]

    def test_yaml_key_given_twice(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("optim:\n  lr: 1\n  lr: 2\n")
        with pytest.raises(UserError, match=r"mine.yaml:3:3: key `lr` is given twice"):
            config_of("--config", str(file))

    def test_yaml_that_is_none(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("optim: [1\n")
        with pytest.raises(UserError, match=r"mine.yaml:2:1: "):
            config_of("--config", str(file))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("optim:\n  lr: \x01\n", "2:7: control character #x01"),
            ("? [a, b]\n: 1\n", "1:3: a key is one word, found a list"),
            ("? {a: b}\n: 1\n", "1:3: a key is one word, found a mapping"),
            ("model: " + "[" * 5000, " nested too deeply"),
            ("log: {name: 2026-02-30}\n", " day is out of range for month"),
        ],
    )
    def test_yaml_that_cannot_be_read(self, text: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            config_of("--config", str(file))
        assert caught.value.message.startswith(f"{file}:{message}")

    def test_an_alias_inside_itself(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("model: &m {other: *m}\n")
        with pytest.raises(UserError, match="mine.yaml: nested too deeply"):
            config_of("--config", str(file))

    def test_yaml_merge_keys(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(
            "peft:\n  rank_pattern: &ranks {q: 4, v: 4}\n  alpha_pattern: {<<: *ranks, v: 8}\n"
        )
        assert config_of("--config", str(file)).peft.alpha_pattern == {"q": 4, "v": 8}

    def test_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").touch()
        with pytest.raises(UserError) as caught:
            config_of("--config", str(tmp_path / "mime.yaml"))
        assert caught.value.hint == "did you mean `mine.yaml`?"

    def test_unknown_recipe(self) -> None:
        with pytest.raises(UserError) as caught:
            config_of("--factory", "llama3_8b")
        assert caught.value.hint == "did you mean `llama31_8b`?"
