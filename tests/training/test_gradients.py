"""The same global batch gives the same gradients however it is split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from lora_train.adapter import attach_adapter
from lora_train.assembly import make_trainer
from lora_train.attention import generation_attention
from lora_train.config import Config
from lora_train.data.batches import Batch, collate
from lora_train.data.prepared import PreparedData, prepare_data
from lora_train.errors import RunError
from lora_train.loss import loss_sum
from lora_train.model import load_base_model, load_tokenizer
from lora_train.trainer import Trainer

CPU = torch.device("cpu")


def start_trainer(config: Config) -> Trainer:
    data = prepare_data(config, load_tokenizer(config.model), max_positions=512)
    set_seed(config.trainer.seed)
    model = attach_adapter(load_base_model(config.model, torch.float32, CPU), config)
    # B starts at zero, where A gets no gradient: a start at which every gradient counts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.train()
    return make_trainer(config, model, data, Accelerator(cpu=True))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.trainable.items() if p.grad is not None}


def step(config: Config) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = start_trainer(config)
    result = trainer.train_step()
    return result.loss, gradients(trainer)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_micro_batches_of_any_size(config_of: Callable[..., Config], micro_batch_size: int) -> None:
    options = ("peft.dropout=0", "data.global_batch_size=8", "trainer.gradient_clip_val=null")
    whole_loss, whole = step(config_of(*options, "data.micro_batch_size=8"))
    loss, split = step(config_of(*options, f"data.micro_batch_size={micro_batch_size}"))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-7)


def test_loss_is_the_mean_over_supervised_tokens(config_of: Callable[..., Config]) -> None:
    """Against a plain computation on each example alone: packing and the normalization at once."""
    config = config_of("peft.dropout=0", "data.global_batch_size=8")
    trainer = start_trainer(config)
    trainer.model.eval()
    total, count = 0.0, 0
    for pack in trainer.schedule.pack_ids(0):
        for example in trainer.data.train_packs[int(pack)]:
            tokens, supervised = trainer.data.train[int(example)]
            ids = torch.from_numpy(tokens.astype("int64"))[None]
            with torch.no_grad(), generation_attention(trainer.model):
                log_probs = trainer.model(input_ids=ids).logits[0].double().log_softmax(-1)
            for place in range(1, len(tokens)):
                if supervised[place]:
                    total -= log_probs[place - 1, ids[0, place]].item()
                    count += 1
    trainer.model.train()
    result = trainer.train_step()
    assert result.supervised_tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_packed_equals_alone(config_of: Callable[..., Config], attention: str) -> None:
    config = config_of(f"model.attn_implementation={attention}", "peft.dropout=0")
    trainer = start_trainer(config)
    data = trainer.data

    def grads_of(batches: list[Batch]) -> dict[str, torch.Tensor]:
        trainer.optimizer.zero_grad()
        for batch in batches:
            loss_sum(trainer.model, batch).backward()
        return gradients(trainer)

    packed = grads_of([collate(data.train, data.train_packs, [0, 1])])
    alone = grads_of(
        [
            collate(data.train, SingleExample(int(example)), [0])  # type: ignore[arg-type]
            for pack in (0, 1)
            for example in data.train_packs[pack]
        ]
    )
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6)


class SingleExample:
    """A pack that holds one example."""

    def __init__(self, example: int) -> None:
        self.example = example

    def __getitem__(self, pack: int) -> list[int]:
        return [self.example]


_TWO_PROCESSES = """
import json, sys
import torch
from accelerate import PartialState
from lora_train.config_loading import resolve
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_gradients import gradients, start_trainer
trainer = start_trainer(resolve(config_file=Path(sys.argv[1])))
result = trainer.train_step()
if trainer.accelerator.is_main_process:
    torch.save({"loss": result.loss, "gradients": gradients(trainer)}, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def test_two_processes(config_of: Callable[..., Config], tmp_path: Path) -> None:
    from lora_train.config_loading import to_yaml

    config = config_of(
        "peft.dropout=0", "data.global_batch_size=8", "trainer.gradient_clip_val=null"
    )
    loss, alone = step(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "two.py").write_text(_TWO_PROCESSES)
    out = tmp_path / "two.pt"
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(tmp_path / "two.py"), str(tmp_path / "config.yaml"), str(out),
            str(Path(__file__).parent),
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    two = torch.load(out)
    assert two["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in alone.items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_silent_lora_b_stops_the_run(config_of: Callable[..., Config]) -> None:
    trainer = start_trainer(config_of())
    layer = trainer.model.base_model.model.model.layers[1].self_attn.q_proj
    layer.forward = layer.base_layer.forward  # a forward pass that leaves the adapter out
    with pytest.raises(RunError, match="no gradient reaches 1 of the adapter's matrices, first "):
        trainer.train_step()
    assert trainer.step == 0


def test_infinite_loss_leaves_the_weights(config_of: Callable[..., Config]) -> None:
    trainer = start_trainer(config_of())
    trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    with torch.no_grad():
        trainer.model.base_model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="step 2: loss nan"):
        trainer.train_step()
    for name, parameter in trainer.trainable.items():
        assert torch.equal(parameter, before[name])


def test_validation_is_normalized_like_training(config_of: Callable[..., Config]) -> None:
    losses = []
    for size in (1, 3):
        config = config_of(f"data.micro_batch_size={size}", "data.global_batch_size=6")
        trainer = start_trainer(config)
        result = trainer.validate()
        assert result is not None
        losses.append(result["val_loss"])
        assert result["val_tokens"] == count_supervised(trainer.data)
        assert trainer.model.training
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def count_supervised(data: PreparedData) -> int:
    assert data.validation is not None
    return int(data.validation.supervised.sum())


def test_limit_val_batches(config_of: Callable[..., Config]) -> None:
    whole = start_trainer(config_of("data.packed_sequence=false")).validate()
    part = start_trainer(
        config_of("data.packed_sequence=false", "trainer.limit_val_batches=2")
    ).validate()
    none = start_trainer(config_of("trainer.limit_val_batches=0")).validate()
    assert whole is not None and part is not None and none is None
    assert part["val_tokens"] < whole["val_tokens"]


def test_state_is_json_and_tensors_only(config_of: Callable[..., Config]) -> None:
    """A checkpoint's state loads without unpickling code."""
    import io

    trainer = start_trainer(config_of())
    trainer.train_step()
    buffer = io.BytesIO()
    torch.save(trainer.optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    assert json.dumps(trainer.scheduler.state_dict(), default=str)
