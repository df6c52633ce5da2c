"""The merged model is base plus adapter, whatever the adapter's kind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_train.merge import tensor_files, weights

# largest logit difference by the rounding of weights to bf16: up to 0.06 on these models, whose
# adapters change logits by 3 to 8
ROUNDING = 0.15


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("llama", []),
        ("llama-tied", []),
        ("qwen3", ["peft.use_rslora=true"]),
        ("llama", ["peft.rank_pattern={k_proj: 2}", "peft.alpha_pattern={down_proj: 32}"]),
        ("llama", ["peft.use_dora=true"]),
        ("llama", ["peft.init=pissa"]),
        ("llama", ["peft.modules_to_save=[lm_head]"]),
        ("llama-tied", ["peft.modules_to_save=[lm_head]"]),
        ("llama", ["peft.target_modules=[q_proj,lm_head]"]),
        ("gpt2", []),
    ],
)
def test_merged_logits_are_those_of_base_and_adapter(
    make_run, merge, logits_of, tmp_path, architecture, words
):
    made = make_run(*words, architecture=architecture)
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    expected = made.logits()
    found = logits_of(tmp_path / "out")
    with made.adapted.disable_adapter():
        effect = (made.logits() - expected).abs().max()
    assert effect > 10 * ROUNDING
    assert (found - expected).abs().max() < ROUNDING
    assert json.loads((tmp_path / "out/merge_proof.json").read_text())["status"] == "skipped"


@pytest.mark.parametrize("words", [[], ["peft.use_dora=true"]])
def test_each_weight_is_the_fp32_sum_rounded_once(make_run, merge, tmp_path, monkeypatch, words):
    # several blocks a weight
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1000)
    made = make_run(*words)
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    found = load_file(tmp_path / "out/model.safetensors")
    base = load_file(made.base / "model.safetensors")
    expected = made.adapted.merge_and_unload().state_dict()
    assert set(found) == set(base)
    changed = 0
    for name, weight in found.items():
        assert weight.dtype == base[name].dtype == torch.bfloat16
        # another order of the same fp32 sums may fall on the other side of a rounding
        differing = (weight != expected[name].bfloat16()).float().mean()
        assert differing < 1e-3, name
        changed += not torch.equal(weight, base[name])
    assert changed == 14


def test_a_model_of_several_files(make_run, merge, logits_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_MAX_SHARD_BYTES", 40_000)
    made = make_run()
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 50_000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert (logits_of(tmp_path / "out") - made.logits()).abs().max() < ROUNDING
    # and back: the files of an index are read like one
    assert set(tensor_files.read_folder(tmp_path / "out")) == set(index["weight_map"])


def test_a_tied_head_stays_tied_or_becomes_its_own(make_run, merge, tmp_path):
    trained_as_one = make_run("peft.modules_to_save=[lm_head]", architecture="llama-tied")
    assert merge(trained_as_one.path, tmp_path / "one", "--no-proof") == 0
    assert json.loads((tmp_path / "one/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "one/model.safetensors")
    # as other trainers leave it: the head was trained alone
    adapter = trained_as_one.path / "adapter/adapter_model.safetensors"
    tensors = load_file(adapter)
    del tensors["base_model.model.model.embed_tokens.weight"]
    save_file(tensors, adapter)
    assert merge(trained_as_one.path, tmp_path / "two", "--no-proof") == 0
    assert json.loads((tmp_path / "two/config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(tmp_path / "two/model.safetensors")
    base = load_file(trained_as_one.base / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    trained = tensors["base_model.model.lm_head.weight"]
    assert torch.equal(found["lm_head.weight"], trained.bfloat16())


def test_the_folder_is_plain_and_complete(make_run, merge, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    made = make_run(f"model.chat_template={template}")
    (made.base / "NOTICE.txt").write_text("terms")
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((made.base / "config.json").read_text())
    for name in ("tokenizer.json", "NOTICE.txt"):
        assert (out / name).read_bytes() == (made.base / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == template.read_text()
    # a turn now ends in a token at which the base does not stop
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    card = (out / "README.md").read_text()
    assert "rank 4, alpha 8" in card and "merged into its weights" in card
    assert str(tmp_path) not in card
    mode = (out / "model.safetensors").stat().st_mode & 0o777
    assert mode == (out / "config.json").stat().st_mode & 0o777
    (made.base / "NOTICE.txt").unlink()


def test_an_unfinished_run_gives_its_newest_checkpoint(make_run, merge, logits_of, tmp_path):
    made = make_run()
    checkpoint = made.path / "checkpoints/step-000003"
    checkpoint.mkdir(parents=True)
    (made.path / "adapter").rename(checkpoint / "adapter")
    (checkpoint / "complete.json").write_text(json.dumps({"step": 3, "files": {}}))
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    assert (logits_of(tmp_path / "out") - made.logits()).abs().max() < ROUNDING
