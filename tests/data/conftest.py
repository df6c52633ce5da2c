"""Small real tokenizers, chat templates in the styles of the field, and files to read."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_train.config import Config, DataConfig, ModelConfig, TrainerConfig

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    'Split the address into JSON: {"number": "12", "street": "Main St", "zip": "62701"}',
    "Context: the model answers Question: what does it answer? Answer: the model",
    "system user assistant tool thinking hello world yes no one two three 0123456789",
    "Below is an instruction that describes a task. ### Response: ### Instruction:",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# like Qwen3: thinking is kept in the last answer only, and an answer without any gets an empty one
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# thinking is kept in the last answer only, and nothing stands for it where there is none
THINKING_IF_ANY = THINKING.replace("and loop.last", "and loop.last and m['reasoning_content']")
# like DeepSeek-R1: prompts for thinking, and drops it from the answers
PROMPTS_FOR_THINKING = CHATML.replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml_with_marks": CHATML_WITH_MARKS,
    "llama3": LLAMA3,
    "inst": INST,
    "thinking": THINKING,
    "thinking_if_any": THINKING_IF_ANY,
    "prompts_for_thinking": PROMPTS_FOR_THINKING,
    "tools": TOOLS,
}
SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>",
]  # fmt: skip


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Like Llama-2's: any text gets a blank in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # trained on words, as Llama-2's, although it splits nowhere when it tokenizes
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer


def wrapped(
    backend: Tokenizer, template: str | None, eos: str, name: str
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    tokenizer.name_or_path = name
    return tokenizer


@pytest.fixture
def make_tokenizer():
    """Make a tokenizer: `bytes`, `trimmed` or `metaspace`, and a template by name or None."""

    def make(template: str | None = "chatml", kind: str = "bytes"):
        backend = metaspace_tokenizer() if kind == "metaspace" else byte_level_tokenizer()
        if kind == "trimmed":
            # as RoBERTa's: the characters of a token leave out its blank
            backend.post_processor = processors.ByteLevel(trim_offsets=True)
        eos = {"llama3": "<|eot_id|>", "inst": "</s>", None: "</s>"}.get(template, "<|im_end|>")
        text = None if template is None else TEMPLATES[template]
        return wrapped(backend, text, eos, f"made-{kind}-{template}")

    return make


@pytest.fixture
def smollm2():
    """Load the real tokenizer, if `make test` or a quickstart has fetched it."""
    cache = Path(os.environ.get("LORA_CACHE_DIR") or Path.cwd() / ".lora_cache")
    folder = cache / "quickstart" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"no embedded model in {folder}: run the quickstart once")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give each test an empty cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("lora_train.data.prepared.cache_dir", lambda: folder)
    return folder


@pytest.fixture
def make_config():
    """Make a configuration from keys of the data section, and `seed`."""

    def make(path, *, seed: int = 1234, **data) -> Config:
        return Config(
            model=ModelConfig(path="model"),
            data=DataConfig(path=str(path), **data),
            trainer=TrainerConfig(seed=seed),
        )

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows as a JSON Lines file; text rows are written as they are."""

    def write(rows, name: str = "train.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return file

    return write


@pytest.fixture
def chat_rows():
    """Make n single-turn chats of different lengths."""

    def make(n: int) -> list[dict]:
        return [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}? " + "hello " * (i % 7)},
                    {"role": "assistant", "content": f"the answer {i}" + " world" * (i % 5)},
                ]
            }
            for i in range(n)
        ]

    return make
