"""A hub with a tiny sharded model and datasets on it, and processes that see it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from fake_hub import FakeHub, serving

MODEL, DATA, TABLE, SQUAD = "org/tiny", "org/words", "org/table", "rajpurkar/squad"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_OURS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LORA_", "NEMO_", "XDG_", "SLURM_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def rows(count: int, tag: str = "") -> list[dict[str, str]]:
    """Rows of the words' task, in NeMo's form."""
    return [
        {"input": f"word {tag}{number} ", "output": f"WORD {number}"} for number in range(count)
    ]


def as_jsonl(content: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in content).encode()


def as_parquet(content: list[dict[str, Any]], folder: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    return file.read_bytes()


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A random Llama of two layers in two shards, a tokenizer of bytes, and what is not loaded."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=letters[1], pad_token=letters[0]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="60KB")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(SHARDS) <= set(files), sorted(files)
    return {
        **files,
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "consolidated.00.safetensors": b"the same once more",
        "pytorch_model.bin": b"a pickle",
        "model.Q4_K_M.gguf": b"quantized",
        "original/params.json": b"{}",
    }


@pytest.fixture(scope="session")
def dataset_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Datasets by name: JSON Lines, Parquet in shards of two configurations, and SQuAD."""
    folder = tmp_path_factory.mktemp("parquet")
    card = (
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n    path: big/*\n"
        "- config_name: small\n  data_files:\n  - split: train\n    path: small/train-*\n"
        "  - split: test\n    path: small/test-*\n---\n# two configurations\n"
    )
    answers = {"text": ["Rome"], "answer_start": [3]}
    question = {"id": "1", "title": "t", "context": "In Rome.", "question": "Where?"}
    return {
        DATA: {
            "README.md": b"# words\n",
            "data/train.jsonl": as_jsonl(rows(40)),
            "data/validation.jsonl": as_jsonl(rows(4, "held out ")),
        },
        TABLE: {
            "README.md": card.encode(),
            "big/train-0.parquet": as_parquet(rows(9, "big "), folder),
            "small/train-00000-of-00002.parquet": as_parquet(rows(3, "first "), folder),
            "small/train-00001-of-00002.parquet": as_parquet(rows(3, "second "), folder),
            "small/test-00000-of-00001.parquet": as_parquet(rows(2, "test "), folder),
        },
        SQUAD: {
            f"plain_text/{split}-00000-of-00001.parquet": as_parquet(
                [{**question, "answers": answers}] * count, folder
            )
            for split, count in (("train", 40), ("validation", 3))
        },
    }


@pytest.fixture(scope="session")
def any_hub() -> Iterator[FakeHub]:
    """A hub that answers, at one address for all tests."""
    with serving(FakeHub()) as hub:
        yield hub


@pytest.fixture
def hub(
    any_hub: FakeHub,
    model_files: dict[str, bytes],
    dataset_files: dict[str, dict[str, bytes]],
) -> FakeHub:
    """The hub, with the repositories that each test begins with."""
    any_hub.repositories, any_hub.faults, any_hub.fetched = {}, {}, []
    any_hub.repository("models", MODEL).push(dict(model_files))
    for name, files in dataset_files.items():
        any_hub.repository("datasets", name).push(dict(files))
    return any_hub


@pytest.fixture(scope="session")
def bare_environment(any_hub: FakeHub) -> dict[str, str]:
    """Variables of a process that sees this hub, without any that says where caches are."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OURS) and name not in _PROXIES
    }
    return kept | {"HF_ENDPOINT": any_hub.url}


@pytest.fixture
def environment(hub: FakeHub, bare_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Variables of a process that sees this hub, and caches of the test's own."""
    return bare_environment | {
        "HF_HOME": str(tmp_path / "hf"),
        "NEMO_HOME": str(tmp_path / "nemo"),
        "LORA_CACHE_DIR": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def offline(environment: dict[str, str]) -> dict[str, str]:
    """Variables of a node without network."""
    return environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def lora_train(
    environment: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program as a user would."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("lora-train"), *words],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Run Python in a process of its own; huggingface_hub reads its variables when imported."""

    def run(code: str, variables: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment if variables is None else variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# What takes long to import is imported once, and each call of the program is a fork of it. What the
# libraries read when they are imported is the same for all: the address, and relative folders.
# Downloads are tested without the trial, which would import torch.
_FORKING = """
import contextlib, io, json, os, signal, sys
import datasets
from lora_train.cli import main
from lora_train.prefetch import contents, fetching, trial
trial.try_offline = lambda words, bundle: {
    "tensors": 0, "weight_files": 0, "tokens": 0, "rows": {"train": 0}
}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for request in sys.stdin:
    if os.fork():
        continue
    lines, variables, folder, answers = json.loads(request)
    with open(answers, "w") as answers:
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        for words in lines:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(words)
            print(json.dumps([status, out.getvalue(), err.getvalue()]), file=answers)
    os._exit(0)
"""


@dataclass
class Done:
    """How a command line ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def forking(
    bare_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[IO[str]]:
    """Where command lines are sent to that are to be run without the trial."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _FORKING],
        env=bare_environment | {"HF_HOME": "hf", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        cwd=tmp_path_factory.mktemp("forking"),
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    yield process.stdin
    process.stdin.close()
    assert process.wait() == 0


@pytest.fixture
def start_fetching(
    forking: IO[str], environment: dict[str, str], tmp_path: Path
) -> Callable[..., Callable[[], list[Done]]]:
    """Start `lora-train prefetch` without its trial: command lines in one process, in turn.

    What is returned waits for their ends.
    """
    count = itertools.count()

    def start(*lines: list[str], **variables: str) -> Callable[[], list[Done]]:
        answers = tmp_path / f"answers-{next(count)}"
        os.mkfifo(answers)
        words = [["prefetch", *line] for line in lines]
        request = [words, environment | variables, str(tmp_path), str(answers)]
        print(json.dumps(request), file=forking, flush=True)

        def ends() -> list[Done]:
            found = [Done(*json.loads(line)) for line in answers.open()]
            assert len(found) == len(lines)
            return found

        return ends

    return start


@pytest.fixture
def fetch(
    start_fetching: Callable[..., Callable[[], list[Done]]],
) -> Callable[..., list[Done]]:
    """Run `lora-train prefetch` as `start_fetching` does, and wait."""

    def run(*lines: list[str], **variables: str) -> list[Done]:
        return start_fetching(*lines, **variables)()

    return run
