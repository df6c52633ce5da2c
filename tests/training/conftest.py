"""A tiny Llama with its tokenizer and a small task, as files; runs take about a second."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_train.cli import parse_command_line
from lora_train.config import Config
from lora_train.config_loading import resolve

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def new_accelerator_state() -> None:
    """accelerate keeps device and precision of a process's first Accelerator: each test its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama with 2 layers, hidden size 32, grouped heads, byte-level BPE."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant upper lower word number"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            # 16 wide, as the fused kernels want them at least
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (96 rows) and validation.jsonl (8 rows): words to upper case."""
    folder = tmp_path_factory.mktemp("tiny_data")
    rng = random.Random(0)
    for name, count in (("train", 96), ("validation", 8)):
        rows = []
        for _ in range(count):
            word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 12)))
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": word},
                        {"role": "assistant", "content": word.upper()},
                    ]
                }
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def words(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """Command line of a short run in fp32, with dropout, in the middle of its first epoch."""
    return [
        f"model.path={tiny_model}",
        f"data.path={tiny_data}",
        f"log.log_dir={tmp_path / 'runs'}",
        "log.name=tiny",
        "data.seq_length=96",
        "data.global_batch_size=2",
        "peft.dim=4",
        "peft.dropout=0.1",
        "trainer.max_steps=8",
        "trainer.precision=fp32",
        "trainer.val_check_interval=3",
        "log.ckpt.every_n_train_steps=2",
        "optim.lr=1e-2",
        "eval.num_generate=2",
        "eval.max_new_tokens=8",
    ]


@pytest.fixture
def words_with(words: list[str]) -> Callable[..., list[str]]:
    """The short run's command line, with some keys set otherwise."""

    def build(*changes: str) -> list[str]:
        keys = {change.partition("=")[0] for change in changes}
        return [*(word for word in words if word.partition("=")[0] not in keys), *changes]

    return build


@pytest.fixture
def config_of(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """The short run's configuration with changes, prepared data cached in the test's folder."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))

    def build(*changes: str) -> Config:
        return resolve(overrides=parse_command_line([*words, *changes]).overrides)

    return build


@pytest.fixture
def lora_train(
    words_with: Callable[..., list[str]], tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """Starts `lora-train` as a process of its own; `code` runs in it first."""

    def start(*changes: str, code: str = "") -> subprocess.Popen[str]:
        program = f"import sys\n{code}\nfrom lora_train.cli import main\nsys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", program, *words_with(*changes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"LORA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )

    return start
