"""A merged model as GGUF is the same model, and the same tokenizer."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_train.gguf_conversion import gguf_to_hf
from lora_train.merge import gguf_writing

TEXTS = ["upper lower word", "Word 12345 - 67,8\n\n  x", "naive cafe \u00e9\u00df \u4f60\u597d"]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_back_through_our_own_reader(make_run, merge, tmp_path, architecture):
    made = make_run(architecture=architecture)
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 0
    gguf_to_hf(tmp_path / "out/tiny-bf16.gguf", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    expected = load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = AutoTokenizer.from_pretrained(tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    config = json.loads((tmp_path / "back/config.json").read_text())
    original = json.loads((made.base / "config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters"):
        assert config[key] == original[key], key


def test_biases_are_reordered_with_their_weights(make_run, merge, base_folder, tmp_path):
    made = make_run(base=base_folder("llama", attention_bias=True))
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "out/tiny-bf16.gguf")
    found = next(each for each in reader.tensors if each.name == "blk.0.attn_q.bias").data
    bias = load_file(tmp_path / "out/model.safetensors")["model.layers.0.self_attn.q_proj.bias"]
    # 4 heads of 16: the halves of a rotated pair side by side
    expected = bias.float().reshape(4, 2, 8).transpose(1, 2).flatten()
    assert expected.abs().max() > 0 and np.array_equal(found, expected.numpy())


def test_rotary_frequencies_of_llama3(make_run, merge, base_folder, tmp_path):
    base = base_folder("llama", rope_parameters=LLAMA3_ROPE, max_position_embeddings=16384)
    made = make_run(base=base)
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 0
    gguf_to_hf(tmp_path / "out/tiny-bf16.gguf", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_parameters"] == LLAMA3_ROPE


def test_qwen3_as_transformers_reads_it(make_run, merge, base_folder, logits_of, tmp_path):
    # transformers takes 128 whatever the file says, as all released models have it
    made = make_run(base=base_folder("qwen3", head_dim=128))
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf", "f32") == 0
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="tiny-f32.gguf", dtype=torch.float32
    )
    ids = torch.arange(3, 203).reshape(4, 50)
    with torch.no_grad():
        found = model(ids).logits
    assert (found - logits_of(tmp_path / "out")).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.01), ("f16", 1e-5)])
def test_fewer_bits(make_run, merge, tmp_path, kind, most):
    assert merge(make_run().path, tmp_path / "out", "--no-proof", "--gguf", kind) == 0
    reader = gguf.GGUFReader(tmp_path / f"out/tiny-{kind}.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = load_file(tmp_path / "out/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    stored = tensors["blk.1.ffn_up.weight"]
    assert stored.tensor_type.name.lower() == kind
    found = gguf.dequantize(stored.data, stored.tensor_type)
    error = np.linalg.norm(found - expected.float().numpy()) / expected.float().norm()
    # a number of bf16 that is not tiny is one of f16
    assert error < most


def test_a_file_that_reads_back_differently(make_run, merge, tmp_path, monkeypatch, capsys):
    right = gguf_writing._encode_rows

    def wrong(rows, kind, name):
        return right(rows * (1.1 if "layers.1.mlp.up_proj" in name else 1), kind, name)

    monkeypatch.setattr(gguf_writing, "_encode_rows", wrong)
    assert merge(make_run().path, tmp_path / "out", "--no-proof", "--gguf") == 1
    assert "blk.1.ffn_up.weight does not read back" in capsys.readouterr().err
    # the merged model itself is kept
    assert (tmp_path / "out/model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_what_is_not_written_is_refused_before_the_merge(make_run, merge, tmp_path, capsys):
    made = make_run(architecture="gpt2")
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 2
    assert "LLAMA_CPP_DIR" in capsys.readouterr().err
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf", "q4_k_m") == 2
    assert "llama-quantize" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_llama_cpp_has_the_first_word(make_run, merge, tmp_path, monkeypatch):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    made = make_run(architecture="gpt2")
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 2
    (folder / "convert_hf_to_gguf.py").write_text(
        "import sys, pathlib\n"
        "a = sys.argv\n"
        "sys.exit(0) if a[1] == '--help' else None\n"
        "assert (pathlib.Path(a[1]) / 'model.safetensors').is_file()\n"
        "pathlib.Path(a[a.index('--outfile') + 1]).write_text(a[a.index('--outtype') + 1])\n"
    )
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf", "q8_0") == 0
    assert (tmp_path / "out/tiny-q8_0.gguf").read_text() == "q8_0"
    assert os.listdir(folder) == ["convert_hf_to_gguf.py"]


def test_a_llama_cpp_that_does_not_start_is_said_and_done_without(
    make_run, merge, tmp_path, monkeypatch, capsys
):
    (tmp_path / "convert_hf_to_gguf.py").write_text("import no_such_module\n")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    made = make_run()
    assert merge(made.path, tmp_path / "out", "--no-proof", "--gguf") == 0
    assert "is not used: ModuleNotFoundError" in capsys.readouterr().err
    assert len(gguf.GGUFReader(tmp_path / "out/tiny-bf16.gguf").tensors) == 21
