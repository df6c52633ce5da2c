"""Run directories on tiny random models, as a run leaves them, made without training."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lora_train.adapter import attach_adapter, save_adapter
from lora_train.cli import main, parse_command_line
from lora_train.config_loading import resolve, to_yaml

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 300
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    # square projections and none: q is 64 x 64, k and v 32 x 64
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gpt2": (GPT2Config, {}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread for tiny tensors, and the signal handlers as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant upper lower word number"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = _CHATML
    return made


def make_model(architecture: str, **changes: Any) -> Any:
    config_class, options = _CONFIGS[architecture]
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=VOCABULARY,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            **{**sizes, **options, **changes},
        )  # fmt: skip
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # at the default 0.02 every score is near zero, and every model is alike
            if parameter.ndim == 2:
                parameter.mul_(4)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):  # zero at first
                parameter.normal_()
    return model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Hugging Face folders in bf16, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str = "llama", **changes: Any) -> Path:
        key = f"{architecture}-{'-'.join(f'{k}{v}' for k, v in changes.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bases") / key
            make_model(architecture, **changes).bfloat16().save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for name, count in (("train", 16), ("validation", 6)):
        rows = []
        for _ in range(count):
            word = "".join(generator.choices("abcdefgh", k=generator.randint(2, 12)))
            roles = [("user", word), ("assistant", word.upper())]
            messages = [{"role": role, "content": text} for role, text in roles]
            rows.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


@dataclass(frozen=True)
class Made:
    """A run directory, and the model that it stands for."""

    path: Path
    base: Path
    adapted: Any
    """Base and adapter in fp32, PEFT's own."""

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.adapted(sample_ids()).logits


def sample_ids() -> torch.Tensor:
    return torch.arange(3, 203).reshape(4, 50) % VOCABULARY


@pytest.fixture
def make_run(
    tmp_path: Path, base_folder: Callable[..., Path], data_folder: Path
) -> Callable[..., Made]:
    """Make a run directory whose adapter has random weights, of keys such as `peft.dim=4`."""

    def make(*words: str, architecture: str = "llama", base: Path | None = None) -> Made:
        base = base or base_folder(architecture)
        targets = "[c_attn,c_fc,c_proj]" if architecture == "gpt2" else None
        defaults = [
            f"model.path={base}", f"data.path={data_folder}", "data.seq_length=128", "peft.dim=4",
            "peft.alpha=8", "trainer.precision=fp32", "log.name=tiny",
            *([f"peft.target_modules={targets}"] if targets else []),
        ]  # fmt: skip
        keys = {word.partition("=")[0] for word in words}
        kept = [word for word in defaults if word.partition("=")[0] not in keys]
        config = resolve(overrides=parse_command_line([*kept, *words]).overrides)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.requires_grad_(False)
        torch.manual_seed(1)
        adapted = attach_adapter(model, config).eval()
        for name, parameter in adapted.named_parameters():
            # B begins at zero: as after some training
            if "lora_B" in name or "modules_to_save" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
            if "magnitude" in name:
                parameter.data *= 1.1
        path = tmp_path / "runs" / "tiny"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(to_yaml(config))
        save_adapter(adapted, path / "adapter")
        return Made(path, base, adapted)

    return make


@pytest.fixture
def merge() -> Callable[..., int]:
    """Calls the command as a user does, and returns its exit status."""

    def call(run: Path, output: Path, *words: str) -> int:
        return main(["merge", str(run), "--output", str(output), *words])

    return call


@pytest.fixture
def logits_of() -> Callable[[Path], torch.Tensor]:
    """What a model folder answers in fp32, loaded as anyone would."""

    def compute(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(sample_ids()).logits

    return compute
