"""Every start trains, saves, loads in plain PEFT on the original base, merges and resumes."""

import json

import pytest
import torch
from peft import PeftModel

from lora_train.adapter import attach_adapter, save_adapter, trainable_summary
from lora_train.attention import packing_kwargs
from lora_train.config import OptimConfig
from lora_train.errors import UserError
from lora_train.model import load_base_model
from lora_train.optimizer import make_optimizer

CPU = torch.device("cpu")
TOKENS = 64
IDS = torch.randint(0, 128, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def inputs(model):
    border = torch.tensor([0, TOKENS], dtype=torch.int32)
    return {
        "input_ids": IDS,
        "position_ids": torch.arange(TOKENS)[None],
        **packing_kwargs(model.config._attn_implementation, border, TOKENS),
    }


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def logits(model, dtype=torch.float32):
    was_training = model.training
    model.eval()
    with autocast(dtype):
        result = model(**inputs(model)).logits.float()
    model.train(was_training)
    return result


def train(model, dtype=torch.float32, steps=4):
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    model.train()
    for _ in range(steps):
        with autocast(dtype):
            predicted = model(**inputs(model)).logits[0, :-1]
        torch.nn.functional.cross_entropy(predicted.float(), IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def load(config, dtype=torch.float32):
    return load_base_model(config.model, dtype, CPU)


def attach(config, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    base = load(config, dtype)
    if config.peft.init == "eva" and not kwargs:
        kwargs["calibration_batches"] = [{**inputs(base), "labels": IDS}] * 4
    return attach_adapter(base, config, **kwargs)


NF4 = {"quantization": "nf4"}
CASES = [
    {"init": "default"},
    {"init": "gaussian"},
    {"init": "orthogonal"},
    {"init": "pissa"},
    {"init": "olora"},
    {"init": "eva"},
    {"init": "default", **NF4},
    {"init": "loftq", **NF4},
    {"init": "eva", **NF4},
    {"init": "default", "use_dora": True},
    {"init": "default", "use_dora": True, **NF4},
    {"init": "pissa", "use_dora": True},
    {"init": "olora", "use_dora": True},
    {"init": "eva", "use_dora": True},
    {"init": "default", "modules_to_save": ["lm_head"]},
    {"init": "default", "modules_to_save": ["lm_head"], "architecture": "llama-tied"},
    {"init": "default", "modules_to_save": ["embed_tokens"], "architecture": "llama-tied"},
    {"init": "pissa", "modules_to_save": ["lm_head"]},
    {
        "init": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8, "linear_fc2": 2},
        "alpha_pattern": {"k_proj": 3},
    },
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_round_trip(case, make_config, tmp_path):
    config = make_config(**case)
    base_logits = logits(load(config))
    model = attach(config)
    # 2^-24 times the size of the factors' product, over two layers; loftq changes nf4 on purpose
    if config.peft.init != "loftq":
        torch.testing.assert_close(logits(model), base_logits, rtol=0, atol=1e-5)
    train(model)
    trained_logits = logits(model)
    assert (trained_logits - base_logits).abs().max() > 0.5
    save_adapter(model, tmp_path)

    plain = PeftModel.from_pretrained(load(config), str(tmp_path))
    torch.testing.assert_close(logits(plain), trained_logits, rtol=0, atol=1e-5)
    if config.model.quantization is None:
        merged = plain.merge_and_unload()
        torch.testing.assert_close(logits(merged), trained_logits, rtol=0, atol=1e-5)

    resumed = attach(config, resume_from=tmp_path)
    assert torch.equal(logits(resumed), trained_logits)
    original = dict(model.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, original[name]), name
        assert parameter.requires_grad == original[name].requires_grad, name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_bf16_base_differs_by_its_own_rounding_only(init, make_config, tmp_path):
    """W - B0 A0 is rounded to bf16 once more; merging any adapter rounds the weights as well."""
    config = make_config(init=init)
    model = attach(config, torch.bfloat16)
    train(model, torch.bfloat16)
    trained = logits(model, torch.bfloat16)
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(load(config, torch.bfloat16), str(tmp_path))
    loaded = logits(plain, torch.bfloat16)
    rounding = (logits(plain.merge_and_unload(), torch.bfloat16) - loaded).abs().mean()
    assert (loaded - trained).abs().mean() <= 2 * rounding
    resumed = attach(config, torch.bfloat16, resume_from=tmp_path)
    assert torch.equal(logits(resumed, torch.bfloat16), trained)


def test_loftq_comes_nearer_to_the_unquantized_model(make_config):
    truth = logits(load(make_config()))
    plain = logits(attach(make_config(init="default", dim=16, **NF4)))
    loftq = logits(attach(make_config(init="loftq", dim=16, **NF4)))
    assert (loftq - truth).abs().mean() < 0.8 * (plain - truth).abs().mean()


def test_nf4_on_cpu_learns_after_an_eval_forward(make_config):
    """bitsandbytes 0.50.2 cuts the gradient there on CPUs with avx512_bf16, without a word."""
    model = attach(make_config(**NF4), torch.bfloat16)
    logits(model, torch.bfloat16)
    model.train()
    with autocast(torch.bfloat16):
        model(**inputs(model)).logits.float().square().mean().backward()
    silent = [
        name for name, p in model.named_parameters()
        if "lora_B" in name and (p.grad is None or not p.grad.any())
    ]  # fmt: skip
    assert silent == []
    # a re-packed layer would also have lost the shape of its weight
    before = logits(model, torch.bfloat16)
    train(model, torch.bfloat16)
    assert (logits(model, torch.bfloat16) - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_in_fp32(make_config, dtype):
    model = attach(make_config(modules_to_save=["lm_head"]), dtype)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    summary = trainable_summary(model)
    assert summary.trainable == sum(p.numel() for p in trainable.values())
    assert str(summary).endswith(
        f"parameters are trained ({summary.trainable / summary.total:.2%})"
    )


def test_saved_config_is_plain_lora_of_twice_the_rank(make_config, tmp_path):
    save_adapter(attach(make_config(init="pissa")), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (8, 16, True)
    # the folder's name alone: where it lies is nobody else's business
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("llama", None)
    assert not (tmp_path / "README.md").exists()


def test_nemo_names(make_config):
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    by_nemo = attach(make_config(target_modules=targets))
    by_default = attach(make_config())
    assert [n for n, _ in by_nemo.named_parameters()] == [
        n for n, _ in by_default.named_parameters()
    ]


def test_all_linear_leaves_the_output_layer_out(make_config):
    model = attach(make_config(target_modules="all-linear"))
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "peft.target_modules: no module of this model is named 'v_porj'; did you mean v_proj?"
            "\nhint: modules that can be named: down_proj, gate_proj, k_proj, lm_head, o_proj, "
            "q_proj, up_proj, v_proj",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 8}},
            "peft.rank_pattern: no module of this model is named 'k_proj'; did you mean q_proj?"
            "\nhint: modules that can be named: q_proj",
        ),
        (
            {"init": "pissa", "dim": 48},
            "peft.init=pissa takes rank 48 from model.layers.0.self_attn.k_proj, which is only "
            "32 x 64\nhint: set peft.dim=32 or less, or peft.init=default",
        ),
    ],
)
def test_errors(make_config, peft, message):
    with pytest.raises(UserError) as error:
        attach(make_config(**peft))
    assert str(error.value) == message


def test_output_layer_of_a_tied_model_is_no_target(make_config):
    with pytest.raises(UserError, match="one matrix with the embedding"):
        attach(make_config("llama-tied", target_modules=["lm_head"]))


def test_eva_refuses_batches_that_it_would_wait_for_forever(make_config):
    config = make_config(init="eva", dim=40)
    with pytest.raises(UserError, match="needs batches with more than 80 answer tokens"):
        attach(config)
