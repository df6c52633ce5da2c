import json
import os
import shutil

import pytest
import torch

from lora_train.config import ModelConfig
from lora_train.errors import UserError
from lora_train.model import describe_model, load_base_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def copy(model_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder("llama"), folder)
    return folder


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_frozen_and_keeps_no_cache(model_folder, dtype):
    model = load_base_model(ModelConfig(path=str(model_folder("llama"))), dtype, CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert model.dtype == dtype
    assert describe_model(model) == (
        f"LlamaForCausalLM, 0.1 M parameters, 2 layers, hidden size 64, "
        f"{str(dtype).removeprefix('torch.')}, attention lora_varlen"
    )


def test_nf4(model_folder):
    config = ModelConfig(path=str(model_folder("llama")), quantization="nf4")
    model = load_base_model(config, torch.bfloat16, CPU)
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == "Linear4bit"
    assert projection.weight.quant_state.nested
    assert projection.support_avx512bf16_for_cpu is False
    assert "0.1 M parameters, 2 layers, hidden size 64, nf4," in describe_model(model)


def test_nf4_without_double_quantization(model_folder):
    config = ModelConfig(
        path=str(model_folder("llama")), quantization="nf4", double_quantization=False
    )
    model = load_base_model(config, torch.bfloat16, CPU)
    assert not model.model.layers[0].self_attn.q_proj.weight.quant_state.nested


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_attention_as_asked(model_folder, attention):
    config = ModelConfig(path=str(model_folder("llama")), attn_implementation=attention)
    model = load_base_model(config, torch.float32, CPU)
    assert model.config._attn_implementation.removeprefix("lora_") == attention


def test_pad_token_is_not_the_stop_token(model_folder):
    tokenizer = load_tokenizer(ModelConfig(path=str(model_folder("llama"))))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template_of_the_users(model_folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = ModelConfig(path=str(model_folder("llama")), chat_template=str(file))
    tokenizer = load_tokenizer(config)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "ab"


def test_broken_chat_template(model_folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("fine\n{% for m in messages %}")
    config = ModelConfig(path=str(model_folder("llama")), chat_template=str(file))
    message = refusal(lambda: load_tokenizer(config))
    assert message.startswith(f"model.chat_template={file}, line 2: Unexpected end of template")


def test_misspelt_folder(model_folder):
    path = str(model_folder("llama").parent / "lama")
    assert refusal(lambda: load_tokenizer(ModelConfig(path=path))) == (
        f"model.path={path}: no such file or folder; did you mean {path[:-4]}llama?"
    )


def test_missing_parent(tmp_path):
    path = tmp_path / "a" / "b" / "model"
    assert refusal(lambda: load_tokenizer(ModelConfig(path=str(path)))) == (
        f"model.path={path}: no such file or folder; {tmp_path} exists, {path.parent} does not"
    )


def test_hub_model_that_is_not_here_offline(tmp_path):
    """In a process of its own: huggingface_hub reads the variables when it is imported."""
    import os
    import subprocess
    import sys

    code = (
        "from lora_train.model import load_tokenizer\n"
        "from lora_train.config import ModelConfig\n"
        "from lora_train.errors import UserError\n"
        "try: load_tokenizer(ModelConfig(path='some-org/some-model', revision='abc'))\n"
        "except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == (
        f"model.path=some-org/some-model is not in the hub cache ({tmp_path}), and "
        "HF_HUB_OFFLINE is set\nhint: on a node with network, once and with the same HF_HOME: "
        "HF_HUB_OFFLINE=0 "
        "lora-train prefetch, then the words of this run"
    ), result.stderr


def test_pickled_weights_only(copy):
    model = load_base_model(ModelConfig(path=str(copy)), torch.float32, CPU)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    assert refusal(lambda: load_base_model(ModelConfig(path=str(copy)), torch.float32, CPU)) == (
        f"model.path={copy} has no safetensors, only pickled weights (.bin), which can run code "
        "when loaded\nhint: if you trust where they come from, set model.allow_pickle=true"
    )
    config = ModelConfig(path=str(copy), allow_pickle=True)
    again = load_base_model(config, torch.float32, CPU)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    message = refusal(lambda: load_tokenizer(ModelConfig(path=str(copy))))
    assert message.startswith(f"model.path={copy} has no weights (*.safetensors)\nhint: was the")


def test_weights_that_may_not_be_read(copy, monkeypatch):
    """Safetensors makes files for their owner alone; the tests may run as root, who reads all."""
    monkeypatch.setattr(os, "access", lambda file, mode: False)
    message = refusal(lambda: load_tokenizer(ModelConfig(path=str(copy))))
    assert message == (
        f"model.path={copy}: model.safetensors may not be read by this user\n"
        f"hint: its owner can mend it: chmod -R a+rX {copy}"
    )


def test_model_with_code(copy):
    edit_config(copy, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.MineForCausalLM"})
    assert refusal(lambda: load_tokenizer(ModelConfig(path=str(copy)))) == (
        f"model.path={copy} brings its own Python code (mine.MineForCausalLM)\n"
        "hint: read that code, then set model.trust_remote_code=true to run it"
    )


def test_known_type_with_code_uses_the_known_one(copy):
    edit_config(copy, auto_map={"AutoModelForCausalLM": "mine.MineForCausalLM"})
    model = load_base_model(ModelConfig(path=str(copy)), torch.float32, CPU)
    assert type(model).__module__.startswith("transformers.")


def test_unknown_type(copy):
    edit_config(copy, model_type="lama")
    message = refusal(lambda: load_tokenizer(ModelConfig(path=str(copy))))
    assert "knows no model type 'lama'; the nearest it knows is llama\nhint: choose" in message


def test_no_language_model(copy):
    edit_config(copy, model_type="vit")
    message = refusal(lambda: load_base_model(ModelConfig(path=str(copy)), torch.float32, CPU))
    assert message == (
        f"model.path={copy} is of type 'vit', which is no causal language model\n"
        "hint: choose a model that generates text"
    )


def test_already_quantized(copy):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refusal(lambda: load_tokenizer(ModelConfig(path=str(copy)))) == (
        f"model.path={copy} is already quantized (gptq)\n"
        "hint: name the unquantized model, and set model.quantization=nf4 for 4 bit"
    )


def test_tokenizer_of_another_model(copy):
    edit_config(copy, vocab_size=64)
    assert refusal(lambda: load_tokenizer(ModelConfig(path=str(copy)))) == (
        f"model.path={copy}: the tokenizer goes up to token 98 ('~'), the embedding has 64 rows\n"
        "hint: the tokenizer is another model's, or tokens were added without resizing"
    )


def test_adapter_instead_of_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(lambda: load_tokenizer(ModelConfig(path=str(tmp_path)))) == (
        f"model.path={tmp_path} holds an adapter, not a base model\n"
        "hint: name the base model in model.path"
    )


def test_folder_with_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    message = refusal(lambda: load_tokenizer(ModelConfig(path=str(tmp_path))))
    assert message.endswith(f"has no config.json\nhint: model.path={tmp_path / 'model.gguf'}")


def test_unknown_embedded_model():
    message = refusal(lambda: load_tokenizer(ModelConfig(path="embedded:llama")))
    assert message.startswith("unknown embedded reference 'embedded:llama'")


def test_gated_repository(monkeypatch):
    from lora_train.model_source import loading_error

    monkeypatch.delenv("HF_TOKEN", raising=False)
    error = OSError("You are trying to access a gated repo.\nMake sure to have access to it")
    assert str(loading_error(error, ModelConfig(path="meta-llama/Llama-3.1-8B"))) == (
        "model.path=meta-llama/Llama-3.1-8B is a gated repository, and HF_TOKEN is not set\n"
        "hint: accept its terms on https://huggingface.co/meta-llama/Llama-3.1-8B, "
        "then give HF_TOKEN"
    )
