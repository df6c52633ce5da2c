"""A run so small that a process on a CPU starts and trains it in seconds, and what it leaves."""

from __future__ import annotations

import json
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what the machine did, not what was computed
_MEASURED = ("step_time_seconds", "tokens_per_second")
# long enough for a fault between its first and its last step
LONG: dict[str, Any] = {
    "num_steps": 40,
    "changes": ("data.global_batch_size=64", "log.ckpt.every_n_train_steps=10"),
}
_INITIALIZING = re.compile(r"Initializing distributed: GLOBAL_RANK: (\d+), MEMBER: (\d+)/(\d+)")


def make_assets(folder: Path) -> None:
    """Write a random Llama of two layers with a tokenizer of bytes, and 64 rows in upper case."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=letters[0], pad_token=letters[0]
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    (folder / "model/model.safetensors").chmod(0o644)  # others train with it
    generator = random.Random(0)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(64):
            word = "".join(generator.choices("abcdefgh", k=generator.randint(4, 24)))
            file.write(json.dumps({"prompt": f"{word} ", "completion": word.upper()}) + "\n")


@dataclass(frozen=True)
class Run:
    """A command line, and the run directory that it fills."""

    assets: Path
    work: Path
    num_steps: int = 3
    changes: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    seen: Path | None = None
    """Where the tests see its log.log_dir, if a node has mounted something there."""

    @property
    def words(self) -> list[str]:
        """What stands behind `lora-train`."""
        words = {
            "model.path": f"{self.assets}/model",
            "data.path": f"{self.assets}/train.jsonl",
            "data.seq_length": "64",
            "data.packed_sequence": "false",
            "data.validation_size": "0",
            "data.global_batch_size": "4",
            "optim.lr": "1e-2",
            "trainer.precision": "fp32",
            "trainer.max_steps": str(self.num_steps),
            "eval.num_generate": "0",
            "log.trackers": "[]",
            "log.name": "tiny",
        } | dict(change.split("=", 1) for change in (*self.changes, *self.more))
        return [f"{key}={value}" for key, value in words.items()]

    @property
    def command(self) -> str:
        """The whole line, for a batch script."""
        return shlex.join(["lora-train", *self.words])

    @property
    def folder(self) -> Path:
        """The run directory."""
        return (self.seen or self.work / "runs") / "tiny"

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, the newest last."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds of the steps, less what was measured and a line cut off."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            {key: value for key, value in row.items() if key not in _MEASURED}
            for row in rows
            if "loss" in row
        ]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [row["loss"] for row in self.steps]

    @property
    def adapter(self) -> bytes:
        """The weights that came out."""
        return (self.folder / "adapter/adapter_model.safetensors").read_bytes()

    def reached(self, step: int) -> bool:
        """Whether a step is done."""
        return any(row["step"] >= step for row in self.steps)


def members(output: str) -> list[tuple[int, int, int]]:
    """The ranks that a run has announced: number from 0, from 1, and how many; in order."""
    found = _INITIALIZING.findall(output)
    return sorted((int(rank), int(member), int(world)) for rank, member, world in found)


def expected_members(world_size: int) -> list[tuple[int, int, int]]:
    """What a run of so many processes announces."""
    return [(rank, rank + 1, world_size) for rank in range(world_size)]


def assert_same(run: Run, uninterrupted: Run) -> None:
    """Each step once, and everything equal to the bit."""
    assert run.steps == uninterrupted.steps
    assert run.adapter == uninterrupted.adapter
