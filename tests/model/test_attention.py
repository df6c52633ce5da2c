import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from lora_train import attention
from lora_train.attention import (
    VARLEN,
    check_isolation,
    choose_attention,
    generation_attention,
    packing_kwargs,
)
from lora_train.errors import RunError, UserError

LENGTHS = [7, 1, 5, 11]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral"]


def packed_row(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, 128, (1, sum(LENGTHS)), generator=generator).to(device),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device),
    }


def borders(device="cpu"):
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()


def logits_and_gradients(model, attention, row):
    model.config.use_cache = False
    model.set_attn_implementation(attention)
    model.zero_grad()
    kwargs = packing_kwargs(attention, borders(row["input_ids"].device), max(LENGTHS))
    logits = model(**row, **kwargs).logits
    logits.float().logsumexp(-1).square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reference", ["eager", "sdpa"])
def test_equals_block_mask_forward_and_backward(make_model, architecture, reference):
    model, row = make_model(architecture), packed_row()
    logits, gradients = logits_and_gradients(model, VARLEN, row)
    expected_logits, expected_gradients = logits_and_gradients(model, reference, row)
    # fp32 sums in another order: 2^-24 each, some hundred terms
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_each_sequence_alone(make_model, architecture):
    model, row = make_model(architecture), packed_row()
    logits, _ = logits_and_gradients(model, VARLEN, row)
    model.set_attn_implementation("eager")
    alone = [model(input_ids=part).logits for part in row["input_ids"].split(LENGTHS, dim=1)]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_window_and_causality_make_a_difference_here(make_model):
    """The equalities above would hold trivially for a model that ignores what it attends to."""
    row = packed_row()
    windowed, _ = logits_and_gradients(make_model("mistral"), VARLEN, row)
    full, _ = logits_and_gradients(make_model("llama"), VARLEN, row)
    assert (windowed - full).abs().max() > 0.1


def test_bf16_on_cpu_is_as_near_to_fp32_as_sdpa(make_model):
    model, row = make_model("llama"), packed_row()
    truth, _ = logits_and_gradients(model, "eager", row)
    model.bfloat16()
    ours, _ = logits_and_gradients(model, VARLEN, row)
    theirs, _ = logits_and_gradients(model, "sdpa", row)
    assert (ours - truth).abs().mean() <= 1.2 * (theirs - truth).abs().mean()


def test_works_under_autocast_with_fp32_norms(make_model):
    model, row = make_model("qwen3"), packed_row()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = logits_and_gradients(model, VARLEN, row)
    truth, _ = logits_and_gradients(model, "eager", row)
    assert (logits - truth).abs().max() < 0.05 * truth.abs().max()


@pytest.mark.parametrize("attention", [VARLEN, "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_isolation_holds(make_model, architecture, attention):
    model = make_model(architecture).train()
    model.config.use_cache = False
    model.set_attn_implementation(attention)
    check_isolation(model, 128, torch.device("cpu"))
    assert model.training


def test_isolation_check_catches_the_cache_trap(make_model):
    model = make_model("llama")
    model.config.use_cache = True
    model.set_attn_implementation("eager")
    with pytest.raises(RunError, match="packed examples are not isolated in LlamaForCausalLM") as e:
        check_isolation(model, 128, torch.device("cpu"))
    assert e.value.hint == "set data.packed_sequence=false and data.micro_batch_size=1"


def test_isolation_check_catches_an_all_ones_mask(make_model):
    model = make_model("llama")
    model.config.use_cache = False
    model.set_attn_implementation("sdpa")
    plain_forward = model.forward
    model.forward = lambda **kw: plain_forward(
        attention_mask=torch.ones_like(kw["input_ids"]), **kw
    )
    with pytest.raises(RunError, match="moved the logits of the next by"):
        check_isolation(model, 128, torch.device("cpu"))


def test_isolation_check_catches_nan(make_model):
    model = make_model("llama")
    model.config.use_cache = False
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match="logits are not finite before training"):
        check_isolation(model, 128, torch.device("cpu"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "no cu_seq_lens_q and max_length_q"),
        ({"attention_mask": torch.ones(1, 4)}, "no cu_seq_lens_q"),
    ],
)
def test_refuses_to_guess_the_borders(make_model, extra, message):
    model = make_model("llama")
    model.config.use_cache = False
    model.set_attn_implementation(VARLEN)
    with pytest.raises(RunError, match=message):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), **extra)


def test_refuses_a_batch_of_rows(make_model):
    model = make_model("llama")
    model.config.use_cache = False
    model.set_attn_implementation(VARLEN)
    with pytest.raises(RunError, match="queries"):
        model(
            input_ids=torch.ones(2, 4, dtype=torch.long),
            **packing_kwargs(VARLEN, torch.tensor([0, 4], dtype=torch.int32), 4),
        )


def test_generation_attention_switches_and_returns(make_model):
    model = make_model("llama")
    model.config.use_cache = False
    model.set_attn_implementation(VARLEN)
    with pytest.raises(ValueError, match="inside"), generation_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert model.config.use_cache
        raise ValueError("inside")
    assert model.config._attn_implementation == VARLEN
    assert not model.config.use_cache


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (LlamaConfig(), VARLEN, "packed rows need neither padding nor a mask"),
        (Gemma2Config(), "eager", "caps its attention scores (attn_logit_softcapping)"),
        (LlamaConfig(attention_dropout=0.1), "sdpa", "drops attention weights"),
        (LlamaConfig(is_causal=False), "sdpa", "is not causal"),
        (GptOssConfig(), "eager", "has attention sinks"),
    ],
)
def test_choice(config, name, reason):
    choice = choose_attention("auto", config, CAUSAL[type(config)])
    assert choice.name == name
    assert reason in choice.reason


def test_varlen_asked_for_and_not_possible():
    config = Gemma2Config()
    with pytest.raises(UserError) as error:
        choose_attention("varlen", config, CAUSAL[type(config)])
    assert str(error.value) == (
        "model.attn_implementation=varlen, but Gemma2ForCausalLM caps its attention scores "
        "(attn_logit_softcapping)\nhint: set model.attn_implementation=auto"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flash_is_as_near_to_fp32_as_sdpa(make_model, architecture):
    """Forward and every gradient; sdpa in bf16 with a block mask sets the scale of the error."""
    model, row = make_model(architecture).cuda(), packed_row("cuda")
    truth, true_gradients = logits_and_gradients(model, "eager", row)
    model.bfloat16()
    ours, our_gradients = logits_and_gradients(model, VARLEN, row)
    theirs, their_gradients = logits_and_gradients(model, "sdpa", row)
    assert (ours - truth).abs().mean() <= 1.5 * (theirs - truth).abs().mean()
    for name, true in true_gradients.items():
        limit = 2 * (their_gradients[name] - true).abs().mean() + 1e-3 * true.abs().max()
        assert (our_gradients[name] - true).abs().mean() <= limit, name
    model.config.use_cache = False
    model.set_attn_implementation(VARLEN)
    check_isolation(model, 128, torch.device("cuda"))


def test_flash_backward_runs_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash backward is deterministic in strict mode only; nothing else is made strict."""
    from torch.nn.attention import varlen

    strict: list[bool] = []

    class Recorder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return q + k + v

        @staticmethod
        def backward(ctx, gradient):
            strict.append(not torch.is_deterministic_algorithms_warn_only_enabled())
            return gradient, gradient * 2, gradient * 3

    monkeypatch.setattr(
        varlen, "varlen_attn", lambda q, k, v, *rest, **options: Recorder.apply(q, k, v)
    )
    borders = torch.tensor([0, 5], dtype=torch.int32)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for inputs, needed in (((q, k, v), (q, k, v)), ((q.detach(), k.detach(), v), (v,))):
            out = attention._flash(*inputs, None, None, borders, 5)
            torch.autograd.grad(out.sum(), needed)
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert strict == [True, True]
    finally:
        torch.use_deterministic_algorithms(was)
