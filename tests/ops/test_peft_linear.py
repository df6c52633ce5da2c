import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
)
from truth import assert_close_to_truth

from lora_kernels import peft_linear
from lora_kernels.peft_linear import FusedLinear, fuse_linears, unfuse_linears

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=96),
    "gemma2": Gemma2Config(**SIZES, intermediate_size=96, num_key_value_heads=1, head_dim=32),
}
# layers of GPT-NeoX, two of each
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
IDS = torch.arange(48).reshape(2, 24) * 31 % 96


def _base(config: PreTrainedConfig, device: str) -> nn.Module:
    torch.manual_seed(0)
    # weights at the usual 0.02 would leave the adapters' gradients next to nothing
    config = copy.deepcopy(config)
    config.initializer_range = 0.1
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device)


def _adapted(
    device: str, config: PreTrainedConfig = CONFIGS["gpt_neox"], **options: Any
) -> PeftModel:
    """A model with an adapter that is not zero."""
    options = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"} | options
    model = get_peft_model(_base(config, device), LoraConfig(**options))
    _fill_adapters(model)
    return model.train()


@torch.no_grad()
def _fill_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)


def _loss(model: nn.Module) -> torch.Tensor:
    ids = IDS.to(next(model.parameters()).device)
    return model(input_ids=ids, labels=ids).loss


def _results(model: nn.Module) -> dict[str, torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = _loss(model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


def _assert_equal(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The dropout of every call of `lora_linear` by a layer, in order."""
    seen: list[Any] = []
    real = peft_linear.lora_linear

    def record(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(peft_linear, "lora_linear", record)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_equals_unfused(device: str, calls: list[Any], name: str) -> None:
    model = _adapted(device, CONFIGS[name])
    truth = _results(copy.deepcopy(model).double())
    unfused = _results(model)
    assert not calls
    report = fuse_linears(model)
    layers = [key for key, module in model.named_modules() if isinstance(module, lora.Linear)]
    assert report.fused == layers and report.unfused == {}
    fused = _results(model)
    assert len(calls) == len(layers)
    assert fused.keys() == unfused.keys() == truth.keys() and len(fused) == 2 * len(layers) + 1
    for key, result in fused.items():
        assert_close_to_truth(result, unfused[key], truth[key], key)

    # again changes nothing, and all of it can be taken back
    assert fuse_linears(model) == report
    _assert_equal(_results(model), fused)
    unfuse_linears(model)
    assert {type(model.get_submodule(key)) for key in layers} == {lora.Linear}
    _assert_equal(_results(model), unfused)


def test_autocast(device: str, calls: list[Any]) -> None:
    model = _adapted(device)
    with torch.autocast(device, torch.bfloat16):
        unfused = _results(model)
        fuse_linears(model)
        fused = _results(model)
    assert len(calls) == 8
    unfuse_linears(model)
    truth = _results(model.double())
    for key, result in fused.items():
        assert result.dtype == unfused[key].dtype
        # the roundings of all layers are in it, so single elements differ by chance
        error = (result.double() - truth[key]).norm()
        assert error <= 2 * (unfused[key].double() - truth[key]).norm() + 1e-3, key


def test_trained_biases_get_their_gradients(device: str, calls: list[Any]) -> None:
    model = _adapted(device, bias="lora_only")
    unfused = _results(model)
    fuse_linears(model)
    fused = _results(model)
    assert len(calls) == 8
    assert sum(name.endswith("base_layer.bias") for name in fused) == 8
    assert fused.keys() == unfused.keys()
    for key, result in fused.items():
        torch.testing.assert_close(result, unfused[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_brings_back_the_masks(
    device: str, calls: list[Any], use_reentrant: bool
) -> None:
    model = _adapted(device, lora_dropout=0.2)
    fuse_linears(model)
    torch.manual_seed(7)
    expected = _results(model)
    assert len(calls) == 8 and None not in calls
    # a mask for each layer and each forward
    assert len({dropout.seed for dropout in calls}) == 8
    torch.manual_seed(7)
    _assert_equal(_results(model), expected)
    assert calls[:8] == calls[8:]
    other = _results(model)
    assert not torch.equal(other["loss"], expected["loss"])

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls.clear()
    torch.manual_seed(7)
    _assert_equal(_results(model), expected)
    assert len(calls) == 16


def test_no_random_number_is_drawn_without_need(device: str, calls: list[Any]) -> None:
    for model in (_adapted(device), _adapted(device, lora_dropout=0.2).eval()):
        fuse_linears(model)
        state = torch.get_rng_state()
        _results(model)
        assert torch.equal(torch.get_rng_state(), state)
    assert calls == [None] * 16


def test_dropout_keeps_the_expectation(device: str) -> None:
    model = _adapted(device, lora_dropout=0.5)
    fuse_linears(model)
    layer = model.get_submodule("base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h")
    x = torch.randn(64, device=device)
    with torch.no_grad():
        # every row has a mask of its own
        mean = layer(x.expand(1000, 64)).mean(0)
        expected = layer.eval()(x)
        base = layer.base_layer(x)
    assert (mean - expected).norm() < 0.2 * (expected - base).norm()


def test_adapters_stay_pefts(device: str, calls: list[Any], tmp_path: Path) -> None:
    model = _adapted(device)
    model.save_pretrained(tmp_path / "unfused")
    fuse_linears(model)
    model.save_pretrained(tmp_path / "fused")
    files = sorted(path.name for path in (tmp_path / "unfused").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        written = (tmp_path / "fused" / name).read_bytes()
        assert written == (tmp_path / "unfused" / name).read_bytes()

    base = _base(CONFIGS["gpt_neox"], device)
    with torch.no_grad():
        plain = _loss(base)
        fused = _loss(model)
        loaded = PeftModel.from_pretrained(base, tmp_path / "fused")
        assert len(fuse_linears(loaded).fused) == 8
        assert torch.equal(_loss(loaded), fused)

        calls.clear()
        with model.disable_adapter():
            assert torch.equal(_loss(model), plain)
        model.merge_adapter()
        torch.testing.assert_close(_loss(model), fused)
        assert not calls
        model.unmerge_adapter()
        torch.testing.assert_close(_loss(model), fused)
        assert len(calls) == 8
        # read at every call
        for module in model.modules():
            if isinstance(module, lora.Linear):
                module.set_scale("default", 0.0)
        torch.testing.assert_close(_loss(model), plain)

        generated = model.generate(input_ids=IDS[:1, :4].to(device), max_new_tokens=4)
        assert generated.shape == (1, 8)
        merged = loaded.merge_and_unload()
        assert not any(isinstance(module, FusedLinear) for module in merged.modules())
        torch.testing.assert_close(_loss(merged), fused)


def test_switching_adapters(device: str, calls: list[Any]) -> None:
    model = _adapted(device)
    fuse_linears(model)
    with torch.no_grad():
        first = _loss(model)
        model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
        _fill_adapters(model)
        model.set_adapter("second")
        calls.clear()
        second = _loss(model)
        assert len(calls) == 8 and not torch.equal(first, second)

        calls.clear()
        model.base_model.set_adapter(["default", "second"])
        both = _loss(model)
        assert not calls
        assert set(fuse_linears(model).unfused.values()) == {"several active adapters"}
        unfuse_linears(model)
        assert torch.equal(_loss(model), both)

        model.base_model.set_adapter("second")
        model.delete_adapter("default")
        assert len(fuse_linears(model).fused) == 8
        torch.testing.assert_close(_loss(model), second)
        names = ["second", "__base__"]
        ids = IDS.to(device)
        calls.clear()
        model.eval()(input_ids=ids, adapter_names=names)
        assert not calls


def test_dora_is_named(device: str, calls: list[Any]) -> None:
    model = _adapted(device, use_dora=True, target_modules=["dense"])
    expected = _results(model)
    report = fuse_linears(model)
    assert report.fused == [] and set(report.unfused.values()) == {"DoRA"}
    assert len(report.unfused) == 2
    _assert_equal(_results(model), expected)
    # on fused layers it is noticed as well
    model = _adapted(device, target_modules=["dense"])
    assert len(fuse_linears(model).fused) == 2
    model.add_adapter("dora", LoraConfig(r=4, target_modules=["dense"], use_dora=True))
    model.set_adapter("dora")
    _results(model)
    assert not calls


def _add_hook(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _replace_forward(layer: Any) -> None:
    layer.base_layer.forward = layer.base_layer.forward


@pytest.mark.parametrize(
    ("reason", "options", "change"),
    [
        ("lora_bias", {"lora_bias": True}, None),
        ("rank 257", {"r": 257}, None),
        ("trained base weight", {}, lambda layer: layer.base_layer.requires_grad_(True)),
        ("fan_in_fan_out", {}, lambda layer: setattr(layer, "fan_in_fan_out", True)),
        ("hooks on Linear", {}, _add_hook),
        ("replaced forward of Linear", {}, _replace_forward),
        ("weight of torch.float8", {}, lambda layer: layer.base_layer.to(torch.float8_e4m3fn)),
        ("no active adapter", {}, lambda layer: layer.lora_A.clear()),
        ("dropout", {}, lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout()})),
        (
            "adapter of Sequential and Linear",
            {},
            lambda layer: layer.lora_A.update({"default": nn.Sequential()}),
        ),
    ],
)  # fmt: skip
def test_reasons(reason: str, options: dict[str, Any], change: Callable[..., None] | None) -> None:
    model = _one_layer(**options)
    if change is None:
        assert fuse_linears(model).unfused["linear"].startswith(reason)
        return
    assert fuse_linears(model).fused == ["linear"]
    change(model.linear)
    assert fuse_linears(model).unfused["linear"].startswith(reason)


def _one_layer(base_layer: nn.Module | None = None, **options: Any) -> nn.Module:
    config = LoraConfig(**({"r": 8, "lora_alpha": 12} | options))
    model = nn.Module()
    base_layer = nn.Linear(16, 24).requires_grad_(False) if base_layer is None else base_layer
    model.linear = lora.Linear(base_layer, "default", config, config.r, config.lora_alpha)
    _fill_adapters(model)
    return model


def test_other_layers_are_named() -> None:
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = _adapted("cpu", config, target_modules=["c_attn", "wte"])
    assert fuse_linears(model) == peft_linear.LinearReport(
        [],
        {
            "base_model.model.transformer.wte": "Embedding is no linear layer that can be fused",
            "base_model.model.transformer.h.0.attn.c_attn": "base layer Conv1D",
        },
    )


def test_inputs_that_are_pefts(
    device: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _one_layer().to(device)
    fuse_linears(model)
    x = torch.randn(3, 16, device=device)
    model.linear(x, alora_offsets=None)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="dtype"):
        model.linear(x.double())
    with pytest.raises(RuntimeError, match="shapes"):
        model.linear(x[:, :15])
    with pytest.raises(TypeError, match="unexpected"):
        model.linear(x, something=1)
    assert len(calls) == 1
    if device == "cpu":
        monkeypatch.setattr(peft_linear.triton.knobs.runtime, "interpret", False)
        expected = model.linear(x)
        assert len(calls) == 1
        unfuse_linears(model)
        assert torch.equal(model.linear(x), expected)


@pytest.mark.parametrize("compress_statistics", [False, True])
def test_nf4(device: str, calls: list[Any], compress_statistics: bool) -> None:
    layer, x = _nf4_layer(device, compress_statistics)
    expected = _layer_results(layer, x)
    assert not calls
    model = nn.ModuleDict({"linear": layer})
    assert fuse_linears(model).fused == ["linear"]
    results = _layer_results(layer, x)
    assert len(calls) == 1
    truth = _dequantized_truth(layer, x)
    for name, result in results.items():
        assert_close_to_truth(result, expected[name], truth[name], name)

    # of another dtype than the base layer computes in
    layer.base_layer.compute_dtype = torch.bfloat16
    layer(x)
    assert len(calls) == 1
    with torch.autocast(device, torch.bfloat16):
        fused = layer(x)
        assert len(calls) == 2
        unfuse_linears(model)
        assert type(layer) is lora.Linear4bit
        unfused = layer(x)
    assert fused.dtype == unfused.dtype == torch.float32
    assert_close_to_truth(fused.detach(), unfused.detach(), truth["y"])


def test_nf4_that_is_packed_for_the_cpu_is_pefts(calls: list[Any]) -> None:
    layer, x = _nf4_layer("cpu", compress_statistics=False)
    fuse_linears(layer)
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert not layer._takes(x)


def _nf4_layer(device: str, compress_statistics: bool) -> tuple[lora.Linear4bit, torch.Tensor]:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(
        64, 48, quant_type="nf4", compress_statistics=compress_statistics
    ).to(device)
    # packed for a kernel without gradients otherwise, by the first forward in eval mode
    base.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=12)
    layer = lora.Linear4bit(base, "default", config, 8, 12).to(device)
    _fill_adapters(layer)
    return layer, torch.randn(2, 9, 64, device=device)


def _layer_results(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"y": y.detach(), "x": x.grad, "a": a.grad.clone(), "b": b.grad.clone()}


def _dequantized_truth(layer: lora.Linear4bit, x: torch.Tensor) -> dict[str, torch.Tensor]:
    import bitsandbytes

    weight = layer.base_layer.weight
    dense = nn.Linear(64, 48, device=x.device)
    dense.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    dense.bias.data = layer.base_layer.bias.data
    plain = lora.Linear(dense, "default", LoraConfig(r=8, lora_alpha=12), 8, 12).to(x.device)
    for name in ("lora_A", "lora_B"):
        getattr(plain, name)["default"].weight.data = getattr(layer, name)["default"].weight.data
    return _layer_results(plain.double(), x.double())


def test_deep_copies_and_pickles_stay_fused(tmp_path: Path, calls: list[Any]) -> None:
    model = _one_layer()
    fuse_linears(model)
    torch.save(model.linear, tmp_path / "layer.pt")
    load = functools.partial(torch.load, tmp_path / "layer.pt", weights_only=False)
    x = torch.randn(3, 16)
    expected = model.linear(x)
    for layer in (copy.deepcopy(model).linear, load()):
        assert type(layer) is FusedLinear
        assert torch.equal(layer(x), expected)
