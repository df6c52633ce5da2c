"""The command line up to a validated configuration: grammar, recipes, messages word for word."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_train.cli import main, parse_command_line
from lora_train.config import Config
from lora_train.config_help import field_docstring, help_text
from lora_train.config_loading import (
    leaf_types,
    load_recipe,
    recipe_names,
    resolve,
    to_yaml,
)
from lora_train.errors import UserError


def config_of(*words: str) -> Config:
    parsed = parse_command_line(words)
    return resolve(
        factory=parsed.factory,
        config_file=parsed.config_file,
        overrides=parsed.overrides,
        problems=parsed.problems,
    )


def problems_of(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config_of(*words)
    return caught.value.message.split("\n  ")[1:]


class TestRecipes:
    @pytest.mark.parametrize("name", recipe_names())
    def test_every_shipped_recipe_loads(self, name: str) -> None:
        config = config_of("--factory", name)
        assert config.log.name == name
        header = (
            Path(sys.modules["lora_train"].__file__).parent / "recipes" / f"{name}.yaml"
        ).read_text()
        assert header.startswith(f"# {name}: ")
        assert f"lora-train --factory {name} " in header or name == "quickstart"
        assert "# Hardware: " in header

    @pytest.mark.parametrize("name", recipe_names())
    def test_recipes_name_no_defaults_twice(self, name: str) -> None:
        """A recipe survives a round trip through the resolved file."""
        assert load_recipe(name)
        config = config_of("--factory", name)
        assert resolve_text(to_yaml(config)) == config

    def test_the_expected_recipes_are_there(self) -> None:
        assert recipe_names() == [
            "llama31_70b_qlora",
            "llama31_8b",
            "llama31_8b_nemo",
            "llama32_1b",
            "mistral_7b",
            "quickstart",
            "qwen3_8b",
        ]

    def test_our_defaults(self) -> None:
        config = config_of("--factory", "llama31_8b")
        assert (config.peft.dim, config.peft.alpha, len(config.peft.target_modules)) == (16, 32, 7)
        assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (
            2e-4,
            (0.9, 0.999),
            0,
        )
        assert (config.optim.lr_scheduler.warmup_ratio, config.optim.lr_scheduler.min_lr) == (
            0.03,
            None,
        )
        assert (config.trainer.gradient_clip_val, config.data.seq_length) == (1.0, 2048)
        assert config.data.packed_sequence and config.data.train_on == "answers"

    def test_nemo_numbers(self) -> None:
        """NeMo 2.4.0: recipes/llama31_8b.py, finetune_default.py, optim/adam.py."""
        config = config_of("--factory", "llama31_8b_nemo")
        assert (config.peft.dim, config.peft.alpha, config.peft.dropout) == (8, 16, 0)
        optim = config.optim
        assert (optim.lr, optim.weight_decay, optim.betas, optim.eps) == (
            1e-4,
            0.1,
            (0.9, 0.98),
            1e-5,
        )
        assert (optim.lr_scheduler.warmup_steps, optim.lr_scheduler.min_lr) == (50, 0)
        data, trainer = config.data, config.trainer
        assert (data.seq_length, data.global_batch_size, data.micro_batch_size) == (2048, 128, 1)
        assert (trainer.max_steps, trainer.val_check_interval, trainer.seed) == (1000, 30, 1234)
        assert (config.log.ckpt.every_n_train_steps, config.log.ckpt.keep_last) == (50, 2)

    def test_the_workshops_line(self) -> None:
        config = config_of(
            "--factory", "llama31_8b",
            "trainer.max_steps=250", "data.global_batch_size=8",
            "optim.lr_scheduler.warmup_steps=50", "trainer.devices=a100:2",
        )  # fmt: skip
        assert config.trainer.max_steps == 250
        assert config.data.global_batch_size == 8
        assert config.optim.lr_scheduler.warmup_steps == 50
        assert config.trainer.devices == 2


def resolve_text(text: str) -> Config:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return resolve(config_file=Path(file.name))


class TestGrammar:
    @pytest.mark.parametrize("word", ["true", "yes", "on", "1", "True", "YES"])
    def test_true(self, word: str) -> None:
        assert config_of(f"peft.use_dora={word}").peft.use_dora is True

    @pytest.mark.parametrize("word", ["false", "no", "off", "0", "False"])
    def test_false(self, word: str) -> None:
        assert config_of(f"data.packed_sequence={word}").data.packed_sequence is False

    @pytest.mark.parametrize("word", ["None", "null", "none"])
    def test_null(self, word: str) -> None:
        assert config_of(f"trainer.gradient_clip_val={word}").trainer.gradient_clip_val is None

    def test_numbers(self) -> None:
        config = config_of("trainer.max_steps=1_000", "optim.lr=2e-4", "peft.alpha=32")
        assert (config.trainer.max_steps, config.optim.lr, config.peft.alpha) == (1000, 2e-4, 32.0)

    @pytest.mark.parametrize(
        "text", ["[q_proj,v_proj]", "['q_proj','v_proj']", '["q_proj", "v_proj"]']
    )
    def test_lists(self, text: str) -> None:
        assert config_of(f"peft.target_modules={text}").peft.target_modules == ["q_proj", "v_proj"]

    def test_a_word_where_a_list_may_stand(self) -> None:
        assert config_of("peft.target_modules=all-linear").peft.target_modules == "all-linear"

    def test_mappings_and_tuples(self) -> None:
        config = config_of("peft.rank_pattern={q_proj: 4}", "optim.betas=(0.9, 0.95)")
        assert config.peft.rank_pattern == {"q_proj": 4}
        assert config.optim.betas == (0.9, 0.95)

    @pytest.mark.parametrize(
        ("text", "count"), [("a100:2", 2), ("4", 4), ("auto", "auto"), ("gpu:1", 1)]
    )
    def test_devices(self, text: str, count: int | str) -> None:
        assert config_of(f"trainer.devices={text}").trainer.devices == count

    @pytest.mark.parametrize(
        "words",
        [
            ["trainer.max_steps=7"],
            ["--max-steps", "7"],
            ["--max-steps=7"],
            ["--max_steps", "7"],
            ["--trainer.max_steps", "7"],
        ],
    )
    def test_three_ways_to_say_one_thing(self, words: list[str]) -> None:
        assert config_of(*words).trainer.max_steps == 7

    def test_switch_without_a_value(self) -> None:
        config = config_of("--gradient-checkpointing", "--max-steps", "3")
        assert config.trainer.gradient_checkpointing and config.trainer.max_steps == 3

    def test_text_keys_keep_numbers_as_text(self) -> None:
        assert config_of("log.name=007").log.name == "007"
        assert config_of("data.path=[x].jsonl").data.path == "[x].jsonl"

    def test_resume_is_the_mode(self) -> None:
        assert config_of("--resume", "never").resume.mode == "never"

    def test_later_words_win_over_the_file_and_the_recipe(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("optim:\n  lr: 3e-4\npeft:\n  dim: 4\n")
        config = config_of("--factory", "qwen3_8b", "--config", str(file), "peft.dim=2")
        assert (config.optim.lr, config.peft.dim, config.model.path) == (3e-4, 2, "Qwen/Qwen3-8B")

    def test_a_complete_file_needs_no_recipe(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("model: {path: m}\ndata: {path: d.jsonl}\n")
        config = config_of("--config", str(file))
        assert (config.model.path, config.log.name, config.peft.dim) == ("m", "mine", 16)


class TestMistakes:
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

    def test_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").touch()
        with pytest.raises(UserError) as caught:
            config_of("--config", str(tmp_path / "mime.yaml"))
        assert caught.value.hint == "did you mean `mine.yaml`?"

    def test_unknown_recipe(self) -> None:
        with pytest.raises(UserError) as caught:
            config_of("--factory", "llama3_8b")
        assert caught.value.hint == "did you mean `llama31_8b`?"


class TestProgram:
    def test_dry_run_prints_what_config_takes_back(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--factory", "qwen3_8b", "--dry-run", "--max-steps", "5"]) == 0
        config = resolve_text(capsys.readouterr().out)
        assert config == config_of("--factory", "qwen3_8b", "--max-steps", "5")

    def test_mistakes_exit_with_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--bogus"]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(
            "error: 1 problem in the configuration:\n  --bogus: unknown option\n"
        )

    def test_help_shows_every_key(self) -> None:
        text = help_text()
        for dotted in leaf_types():
            assert f"  {dotted}  [" in text
            assert field_docstring(dotted) in text
        assert max(map(len, text.splitlines())) <= 120

    def test_help_and_mistakes_are_quick_and_need_no_torch(self) -> None:
        """A bad run is refused in under a second (best of three: the machine may be busy)."""
        code = (
            "import sys; from lora_train.cli import main; status = main(sys.argv[1:]); "
            "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules); "
            "assert not heavy, heavy; sys.exit(status)"
        )
        for words, status in ((["--help"], 0), (["--factory", "qwen3_8b", "optim.lr=x"], 2)):
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", code, *words], capture_output=True, text=True
                )
                seconds.append(time.perf_counter() - begun)
                assert done.returncode == status, done.stderr
            assert min(seconds) < 1.0
