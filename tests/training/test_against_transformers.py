"""On the same packed batches the loss curve is that of Hugging Face's own Trainer with PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers import Trainer as TransformersTrainer

from lora_train.adapter import attach_adapter, save_adapter
from lora_train.assembly import make_trainer
from lora_train.config import Config
from lora_train.data.batches import BatchSchedule, collate
from lora_train.data.prepared import PreparedData, prepare_data
from lora_train.model import load_base_model, load_tokenizer
from lora_train.optimizer import make_scheduler

STEPS = 12
OPTIONS = (
    "peft.dropout=0",
    "data.global_batch_size=4",
    "data.micro_batch_size=1",
    f"trainer.max_steps={STEPS}",
    "optim.lr=5e-3",
    "optim.weight_decay=0.1",
    "optim.lr_scheduler.warmup_steps=3",
    "trainer.gradient_clip_val=0.5",
)


def ours(config: Config, data: PreparedData, start: Path) -> list[tuple[float, float]]:
    set_seed(config.trainer.seed)
    base = load_base_model(config.model, torch.float32, torch.device("cpu"))
    model = attach_adapter(base, config)
    save_adapter(model, start)
    model.train()
    trainer = make_trainer(config, model, data, Accelerator(cpu=True))
    results = [trainer.train_step() for _ in range(STEPS)]
    return [(result.loss, result.grad_norm) for result in results]


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The same packs in the same order, as transformers' flattening collator would give them."""

    def __init__(self, config: Config, data: PreparedData) -> None:
        self.config, self.data = config, data

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        data = self.data
        schedule = BatchSchedule(
            len(data.train_packs), self.config.data.global_batch_size, self.config.trainer.seed
        )
        for step in range(STEPS):
            for pack in schedule.pack_ids(step):
                batch = collate(data.train, data.train_packs, [pack])
                yield {
                    "input_ids": batch.input_ids[0],
                    "labels": batch.labels[0],
                    "position_ids": batch.position_ids[0],
                }


def theirs(
    config: Config, data: PreparedData, tiny_model: Path, start: Path, folder: Path
) -> list[tuple[float, float]]:
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(base, start, is_trainable=True)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    trainer = TransformersTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=config.data.global_batch_size,
            max_grad_norm=config.trainer.gradient_clip_val or 0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Batches(config, data),
        data_collator=lambda rows: {key: value[None] for key, value in rows[0].items()},
        optimizers=(optimizer, make_scheduler(optimizer, optim, STEPS)),
    )
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def test_same_curve(config_of: Callable[..., Config], tiny_model: Path, tmp_path: Path) -> None:
    config = config_of(*OPTIONS)
    data = prepare_data(config, load_tokenizer(config.model), max_positions=512)
    assert len(data.train_packs) < STEPS * 4, "the run should go over an epoch's end"
    our_curve = ours(config, data, tmp_path / "start")
    their_curve = theirs(config, data, tiny_model, tmp_path / "start", tmp_path / "trainer")
    assert len(our_curve) == len(their_curve) == STEPS
    for (loss, norm), (their_loss, their_norm) in zip(our_curve, their_curve, strict=True):
        assert loss == pytest.approx(their_loss, abs=1e-4)
        assert norm == pytest.approx(their_norm, rel=1e-3)
    assert our_curve[-1][0] < our_curve[0][0] - 0.1, "nothing was learned"


def test_adapter_loads_and_merges_in_plain_peft(
    config_of: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of()
    set_seed(0)
    model = attach_adapter(
        load_base_model(config.model, torch.float32, torch.device("cpu")), config
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untouched = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert type(untouched.peft_config["default"]) is LoraConfig
    ids = torch.arange(3, 40)[None]
    model.eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected: Any = model(input_ids=ids).logits
        base_logits = get_base_logits(tiny_model, ids)
        assert (expected - base_logits).abs().max() > 0.01
        torch.testing.assert_close(untouched(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        merged = untouched.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def get_base_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits


def test_get_peft_model_starts_alike(config_of: Callable[..., Config], tiny_model: Path) -> None:
    """The adapter's start is PEFT's own, seed for seed."""
    config = config_of("peft.dropout=0")
    set_seed(7)
    mine = attach_adapter(load_base_model(config.model, torch.float32, torch.device("cpu")), config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    set_seed(7)
    theirs = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=32, target_modules=config.peft.target_modules),
    )
    stock = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, stock[name])
