"""The command line up to a validated configuration: grammar, recipes, the program."""

from __future__ import annotations

import importlib.util
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


def config_of(*words: str) -> Config:
    return parse_command_line(words).resolve()


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

    def test_a_resolved_file_has_one_of_two_rivals(self) -> None:
        config = config_of("optim.lr_scheduler.warmup_steps=5")
        assert resolve_text(to_yaml(config)) == config

    def test_the_expected_recipes_are_there(self) -> None:
        assert recipe_names() == [
            "llama31_70b_fsdp2",
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
        ("text", "count"),
        [("a100:2", 2), ("4", 4), ("auto", "auto"), ("gpu:1", 1), ("1g.10gb:1", 1)],
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
        assert config.trainer.gradient_checkpointing is True and config.trainer.max_steps == 3
        config = config_of("--gradient-checkpointing", "auto", "--max-steps", "3")
        assert config.trainer.gradient_checkpointing == "auto" and config.trainer.max_steps == 3

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

    def test_a_boolean_key_takes_only_a_boolean_word(self) -> None:
        config = config_of("--packed-sequence", "data.path=x", "--use-dora", "no")
        assert (config.data.packed_sequence, config.data.path) == (True, "x")
        assert config.peft.use_dora is False
        assert config_of("--add-bos", "data.path=x").data.add_bos is True

    @pytest.mark.parametrize("text", ["'x.jsonl'", '"x.jsonl"', " x.jsonl "])
    def test_one_pair_of_quotes_goes(self, text: str) -> None:
        assert config_of(f"data.path={text}").data.path == "x.jsonl"
        assert config_of("data.path='x").data.path == "'x"


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

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["data.micro_batch_size=2"], "data.global_batch_size=1 does not divide into micro-"),
            (["trainer.devices=2"], "data.global_batch_size=1 does not divide into micro-"),
            (["log.trackers=[trackio]"], "log.trackers: trackio not installed"),
        ],
    )
    def test_dry_run_refuses_what_the_run_would(
        self,
        words: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert main(["--dry-run", *words]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(f"error: {message}")

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
        for words, status in (
            (["--help"], 0),
            (["--factory", "qwen3_8b", "optim.lr=x"], 2),
            (["data.global_batch_size=5", "data.micro_batch_size=2"], 2),
        ):
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", code, *words], capture_output=True, text=True
                )
                seconds.append(time.perf_counter() - begun)
                assert done.returncode == status, done.stderr
            assert min(seconds) < 1.0
