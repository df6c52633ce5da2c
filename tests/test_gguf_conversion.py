"""A GGUF file written from a known model must give that model back."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_train.gguf_conversion import gguf_to_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]


def byte_tokens() -> list[str]:
    """The 256 byte tokens of byte-level BPE, as every GPT-2-like vocabulary spells them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def llama_model(tie: bool = False, rope: dict | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + 2 + len(SPECIAL_TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config)
    # parameters only: a loaded model keeps its rotary frequencies in float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rotary rows as llama.cpp's converter does."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "llama-bpe",
    extra_tensors: dict[str, np.ndarray] | None = None,
    extra_keys: dict[str, int] | None = None,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (extra_keys or {}).items():
        writer.add_uint32(key, value)

    # "ab" exists as a token but no merge leads to it: only Llama 3's rule takes it whole
    tokens = [*byte_tokens(), "he", "ab", *SPECIAL_TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * len(SPECIAL_TOKENS))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(259)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        gguf_name = name.replace("model.layers.", "blk.")
        for hf, ggml in names.items():
            gguf_name = gguf_name.replace(hf, ggml)
        writer.add_tensor(gguf_name, np.ascontiguousarray(weight))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_divisors(model: LlamaForCausalLM) -> np.ndarray:
    """What llama.cpp stores in rope_freqs: the plain frequencies over the scaled ones."""
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return (plain / model.model.rotary_emb.inv_freq).float().numpy()


@pytest.mark.parametrize("tie", [True, False])
def test_weights_come_back_bit_for_bit(tmp_path, tie):
    model = llama_model(tie=tie)
    write_gguf(tmp_path / "m.gguf", model)
    gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert converted.dtype == torch.bfloat16
    assert converted.config.tie_word_embeddings is tie
    assert (converted.get_input_embeddings().weight is converted.lm_head.weight) is tie
    expected = model.state_dict()
    found = converted.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_train.gguf_conversion._MAX_SHARD_BYTES", 40_000)
    model = llama_model()
    write_gguf(tmp_path / "m.gguf", model)
    gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")

    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path, factor):
    model = llama_model(rope={**LLAMA3_ROPE, "factor": factor})
    write_gguf(
        tmp_path / "m.gguf", model, extra_tensors={"rope_freqs.weight": rope_divisors(model)}
    )
    gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert converted.config.rope_parameters == {**LLAMA3_ROPE, "factor": factor}
    torch.testing.assert_close(
        converted.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )


def test_llama3_tokenizer_follows_llama_cpp(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_model())
    gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.tokenize("ab he") == ["ab", "\u0120", "he"]
    assert tokenizer("he").input_ids == [258, 256]  # starts with <|begin_of_text|>
    assert tokenizer("<|eot_id|>", add_special_tokens=False).input_ids == [259]
    assert tokenizer.eos_token == "<|eot_id|>"
    assert len(tokenizer) == 261  # and none that the embedding has no row for
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert json.loads((tmp_path / "hf/config.json").read_text())["pad_token_id"] == 260


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre = 'unheard-of'"),
        ({"extra_keys": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"extra_keys": {"split.count": 2}}, "split over 2 files"),
        (
            {"extra_tensors": {"blk.0.attn_q.bias": np.zeros(128, np.float32)}},
            "tensors that a Llama model lacks: blk.0.attn_q.bias",
        ),
        (
            {"extra_tensors": {"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}},
            "scales its rope frequencies",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", llama_model(), **options)
    with pytest.raises(ValueError, match=message):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot read .* as GGUF"):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    with pytest.raises(ValueError, match="no such GGUF file"):
        gguf_to_hf(tmp_path / "absent.gguf", tmp_path / "hf")


def test_a_cut_file_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_model())
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot read .* as GGUF"):
        gguf_to_hf(tmp_path / "cut.gguf", tmp_path / "hf")
