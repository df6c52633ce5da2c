"""The whole-decoder path against stock PEFT on tiny models: losses, gradients, fall-backs."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from typing import Any

import pytest
import torch
from decoder_models import ALL_LINEARS, FAMILIES, adapter_gradients, make_model, make_row
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import nn

from lora_kernels.attention import attention_forward
from lora_kernels.dropout import Dropout, apply_dropout_reference
from lora_kernels.peft_decoder import FusedDecoder
from lora_kernels.peft_obstacles import _device_obstacle, decoder_obstacle
from lora_kernels.self_check import check_decoder


@pytest.fixture(autouse=True)
def _any_dtype(monkeypatch):
    # a GPU is refused fp32, in which the two can be compared
    monkeypatch.setattr("lora_kernels.peft_obstacles._device_obstacle", lambda weight: None)


def loss_of(model: PeftModel, row: dict[str, Any]) -> torch.Tensor:
    logits = model(use_cache=False, **row).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, row["input_ids"][0, 1:], reduction="sum")


def assert_fused_equals_stock(stock: PeftModel, row: dict[str, Any]) -> FusedDecoder:
    model = copy.deepcopy(stock)
    expected = loss_of(stock, row)
    expected.backward()
    assert decoder_obstacle(model) is None
    fused = FusedDecoder(model)
    assert fused.obstacle_now() is None
    actual = loss_of(model, row)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, stock)
    return fused


def assert_same_gradients(model: PeftModel, stock: PeftModel) -> None:
    """Two fp32 results of the same formulas; the bound against truth stands in test_decoder.py."""
    gradients, expected = adapter_gradients(model), adapter_gradients(stock)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-6, f"{name}: {error:.3g}"


@pytest.fixture
def was_fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets an entry for each pass that the fused decoder made."""
    passes: list[bool] = []
    original = FusedDecoder.hidden_states

    def hidden_states(self: FusedDecoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        passes.append(True)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusedDecoder, "hidden_states", hidden_states)
    return passes


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_stock_peft(family, was_fused, device):
    assert_fused_equals_stock(make_model(family, device=device), make_row(device=device))
    assert was_fused


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1},
        {"r": 24, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"k_proj": 17, "gate_proj": 2}, "alpha_pattern": {"o_proj": 3}},
        {"r": 80},
    ],
    ids=lambda lora: "-".join(lora),
)
def test_ranks_alphas_and_targets_of_any_kind(lora, device):
    assert_fused_equals_stock(make_model(device=device, **lora), make_row(device=device))


def test_rows_of_a_batch_are_sequences_of_their_own(device):
    tokens = make_row((8, 8, 8), device)["input_ids"].view(3, 8)
    stock = make_model(device=device)
    model = copy.deepcopy(stock)
    FusedDecoder(model)
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (stock, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_only_the_rows_that_are_read_are_computed(device):
    row = make_row(device=device)
    stock = make_model("qwen3", device=device)
    model = copy.deepcopy(stock)
    fused = FusedDecoder(model)
    predicting = torch.tensor([2, 3, 9, 17], device=device)
    targets = row["input_ids"][0, predicting + 1]
    logits = stock(use_cache=False, **row).logits[0, predicting]
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    actual = fused.loss_sum(
        row["input_ids"], row["position_ids"], row["cu_seq_lens_q"], row["max_length_q"],
        predicting, targets,
    )  # fmt: skip
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, stock)


def test_checkpointing_and_accumulation_give_the_same_bits(device):
    row = make_row(device=device)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(device=device, lora_dropout=0.25, target_modules=["q_proj", "up_proj"])
        FusedDecoder(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        for _ in range(2):
            loss_of(model, row).backward()
        gradients.append(adapter_gradients(model))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


class _GivenDropout(nn.Module):
    """PEFT's dropout module with the mask that the kernels draw."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_dropout_reference(x.flatten(0, -2), self.dropout).view_as(x)


def test_dropout_is_that_of_the_counter(device):
    stock = make_model(device=device, lora_dropout=0.3)
    model = copy.deepcopy(stock)
    row = make_row(device=device)
    fused = FusedDecoder(model)
    torch.manual_seed(5)
    actual = loss_of(model, row)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31, ()))
    numbers = dict(zip(ALL_LINEARS, (0, 0, 0, 1, 2, 2, 3), strict=True))
    for index, layer in enumerate(stock.get_base_model().model.layers):
        for name, number in numbers.items():
            part = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
            given = _GivenDropout(Dropout(0.3, seed, 4 * index + number))
            getattr(part, name).lora_dropout["default"] = given
    expected = loss_of(stock, row)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, stock)
    # and in eval mode nothing is dropped
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model.eval(), row), loss_of(stock_eval(stock), row))
    assert fused.obstacle_now() is None


def stock_eval(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, _GivenDropout):
            module.dropout = Dropout(0.0, 0, 0)
    return model.eval()


def test_new_weights_count_at_the_next_pass(device):
    row = make_row(device=device)
    stock = make_model(device=device)
    model = copy.deepcopy(stock)
    FusedDecoder(model)
    for each in (stock, model):
        for parameter in each.parameters():
            if parameter.requires_grad:
                # leaves no trace in the version counter
                parameter.data.mul_(0.5)
        for module in each.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = 3.0
    losses = [loss_of(each, row) for each in (model, stock)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, stock)


def set_scaling(model: PeftModel, scaling: float) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = scaling


def test_backward_takes_the_scaling_of_its_forward(device):
    row = make_row(device=device)
    stock = make_model(device=device)
    model = copy.deepcopy(stock)
    FusedDecoder(model)
    for each in (stock, model):
        loss = loss_of(each, row)
        set_scaling(each, 0.0)
        loss_of(each, row)
        loss.backward()
    assert_same_gradients(model, stock)


def test_weights_changed_between_forward_and_backward_are_refused(device):
    model = make_model(device=device)
    FusedDecoder(model)
    loss = loss_of(model, make_row(device=device))
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _steer(model: PeftModel) -> None:
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output + 1)


def _steer_norm(model: PeftModel) -> None:
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, inputs, output: output * 2)


def _replace_forward(model: PeftModel) -> None:
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.forward = lambda x: torch.zeros_like(x)


def _unload(model: PeftModel) -> None:
    model.unload()


def _load_in_place(model: PeftModel) -> None:
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _replace_adapter(model: PeftModel) -> None:
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("default", config)
    model.set_adapter("default")


def _drop_layers(model: PeftModel) -> None:
    model.get_base_model().config.num_hidden_layers = 1


def _change_norm(model: PeftModel) -> None:
    model.get_base_model().model.layers[0].input_layernorm.weight.data.mul_(1.5)


def _change_bias(model: PeftModel) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().bias.data.add_(1)


def _no_causality(model: PeftModel) -> None:
    model.get_base_model().config.is_causal = False


@pytest.mark.parametrize(
    "change",
    [
        _steer, _steer_norm, _replace_forward, _unload, _load_in_place, _replace_adapter,
        _drop_layers, _change_norm, _change_bias, _no_causality,
    ],
)  # fmt: skip
def test_what_is_done_to_the_model_later_counts(change, device):
    row = make_row(device=device)
    stock = make_model("qwen2", device=device)
    model = copy.deepcopy(stock)
    fused = FusedDecoder(model)
    before = loss_of(stock, row)
    for each in (stock, model):
        change(each)
    expected = loss_of(stock, row)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(loss_of(model, row), expected, rtol=1e-5, atol=1e-5)
    fused.undo()
    torch.testing.assert_close(loss_of(model, row), expected, rtol=1e-5, atol=1e-5)


def test_hooks_around_the_decoder_are_called_for_the_loss_too(device):
    model = make_model(device=device)
    fused = FusedDecoder(model)
    assert fused.loss_obstacle_now() is None
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    assert fused.loss_obstacle_now() == "Linear has hooks or another forward"
    handle.remove()
    fused.undo()
    assert fused.loss_obstacle_now() == "it was undone"


def test_a_cache_that_is_asked_for_is_given(device):
    model = make_model(device=device).eval()
    FusedDecoder(model)
    out = model(input_ids=make_row(device=device)["input_ids"], use_cache=True)
    assert out.past_key_values is not None


def test_a_layer_of_each_kind_is_checked(device):
    fused = FusedDecoder(make_model("qwen2", device=device))
    stack = fused.stack
    before = [parameter.clone() for parameter in stack.parameters]
    assert check_decoder(stack).failures == []
    for parameter, kept in zip(stack.parameters, before, strict=True):
        assert torch.equal(parameter, kept)
    # the second layer alone has a window
    stack.layers[1] = dataclasses.replace(stack.layers[1], attention_scale=0.3)
    reference_scale = {1: 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lora_kernels.decoder_layer.attention_forward",
            lambda *args, scale, **kwargs: attention_forward(
                *args, scale=reference_scale.get(1, scale), **kwargs
            ),
        )
        failures = check_decoder(stack).failures
    assert failures
    assert all(line.startswith("in layer 1,") for line in failures)


def test_zero_b_is_the_base_model_to_the_bit(device):
    row = make_row(device=device)
    model = make_model(device=device)
    FusedDecoder(model)
    results = []
    for fill in (0.0, None):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.0)
                elif "lora_A" in name and fill is None:
                    parameter.normal_()
            results.append(model(use_cache=False, **row).logits)
    assert torch.equal(*results)


def test_save_load_merge_generate_and_undo_are_pefts_own(tmp_path, device):
    row = make_row(device=device)
    stock = make_model("qwen2", device=device)
    model = copy.deepcopy(stock)
    fused = FusedDecoder(model)
    prompt = row["input_ids"][:, :5]
    for each in (stock, model):
        each.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=prompt, **options), stock.generate(input_ids=prompt, **options)
    )
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "fused")
    weights, settings = [], []
    for kind in ("stock", "fused"):
        weights.append((tmp_path / kind / "adapter_model.safetensors").read_bytes())
        found = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        # PEFT writes a set
        settings.append(found | {"target_modules": sorted(found["target_modules"])})
    assert weights[0] == weights[1]
    assert settings[0] == settings[1]
    with torch.no_grad():
        expected = loss_of(stock, row)
        with model.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(loss_of(model, row), loss_of(stock, row))
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(loss_of(model, row), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(loss_of(model, row), expected, rtol=1e-4, atol=1e-4)
    fused.undo()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, row), expected, rtol=1e-4, atol=1e-4)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")


def test_a_merged_model_is_saved_while_fused(tmp_path, device):
    row = make_row(device=device)
    model = make_model(device=device)
    FusedDecoder(model)
    model.eval()
    with torch.no_grad():
        expected = loss_of(model, row)
        merged = model.merge_and_unload()
        torch.testing.assert_close(loss_of(merged, row), expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, attn_implementation="sdpa").to(device)
        torch.testing.assert_close(loss_of(again, row), expected, rtol=1e-4, atol=1e-4)


def test_an_nf4_base_is_its_dequantized_self(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    row = make_row(device=device)
    # blocks of 64 weights: bitsandbytes' CPU kernel wants rows of whole ones
    stock = make_model("qwen2", device=device, hidden_size=64, intermediate_size=128)
    model = copy.deepcopy(stock)
    for theirs, ours in zip(stock.modules(), list(model.modules()), strict=True):
        if not isinstance(ours, lora.Linear):
            continue
        dense = ours.base_layer
        packed = bitsandbytes.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=dense.bias is not None, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            dense.weight.data.cpu(), requires_grad=False, quant_type="nf4"
        ).to(device)
        packed.bias = dense.bias
        ours.base_layer = packed
        theirs.base_layer.weight.data = bitsandbytes.functional.dequantize_4bit(
            packed.weight.data, packed.weight.quant_state
        )
    assert decoder_obstacle(model) is None
    fused = FusedDecoder(model)
    losses = [loss_of(each, row) for each in (model, stock)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, stock)
    # merging quantizes anew: another weight
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(128, 64), requires_grad=False, quant_type="nf4"
    ).to(device)
    assert fused.obstacle_now() == "a parameter weight was replaced after the model was fused"


def test_a_second_adapter_takes_pefts_forward(device, caplog):
    row = make_row(device=device)
    stock = make_model(device=device)
    model = copy.deepcopy(stock)
    FusedDecoder(model)
    for each in (stock, model):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        each.add_adapter("other", config)
        each.set_adapter("other")
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        torch.testing.assert_close(loss_of(model, row), loss_of(stock, row))
        loss_of(model, row)
    assert caplog.text.count("the active adapters are ['other']") == 1
    for each in (stock, model):
        each.set_adapter("default")
    torch.testing.assert_close(loss_of(model, row), loss_of(stock, row), rtol=1e-5, atol=1e-5)


def test_a_backward_under_autocast_is_the_same(device):
    gradients = []
    for enabled in (False, True):
        model = make_model(device=device)
        FusedDecoder(model)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            hidden = model.get_base_model().model(use_cache=False, **make_row(device=device))
            hidden.last_hidden_state.square().sum().backward()
        gradients.append(adapter_gradients(model))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_second_backward_is_refused(device):
    model = make_model(device=device)
    FusedDecoder(model)
    loss = loss_of(model, make_row(device=device))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "layers.0.self_attn.q_proj is a DoraLinearVariant"),
        ({"lora_bias": True}, "lora_B of layers.0.self_attn.q_proj has a bias"),
        ({"modules_to_save": ["input_layernorm"]}, "layers.0.input_layernorm is trained in full"),
    ],
)
def test_what_does_not_fit_is_named(lora, reason, device):
    assert decoder_obstacle(make_model(device=device, **lora)) == reason


def test_the_lm_head_may_be_trained(device):
    row = make_row(device=device)
    stock = make_model("mistral", device=device, modules_to_save=["lm_head"])
    fused = assert_fused_equals_stock(stock, row)
    head = fused.model.get_base_model().lm_head.modules_to_save["default"].weight
    assert head.grad is not None


def test_devices_and_dtypes_that_do_not_fit(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = _device_obstacle(torch.zeros(1, dtype=torch.bfloat16))
    assert on_cpu == "the model is on cpu, and the kernels need a GPU"
