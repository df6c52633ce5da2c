"""Training with a base model that FSDP2 shards over CPU processes, beside one that is whole.

The workers below are started as this file, under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed


def start(
    worker: str,
    num_processes: int,
    *arguments: object,
    interpreted: bool = False,
    device: str = "cpu",
) -> str:
    """Run a worker in several processes; return what they printed."""
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if interpreted else "0"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(num_processes), __file__, worker, device, *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_peft_trains_a_sharded_base_as_it_trains_a_whole_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    """On three processes, over which no matrix divides evenly; and one of them saves alone."""
    said = start("plain", 3, tiny_model, tmp_path)
    assert said.count("same gradients") == 3 * 4


@pytest.mark.slow
def test_the_fused_decoder_trains_a_sharded_base_as_it_trains_a_whole_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    said = start("fused", 2, tiny_model, tmp_path, interpreted=True)
    assert said.count("same gradients") == 2 * 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("worker", ["plain", "fused"])
def test_on_gpus_in_bf16(worker: str, tiny_model: Path, tmp_path: Path) -> None:
    said = start(worker, 2, tiny_model, tmp_path, device="cuda")
    assert said.count("same gradients") == 2 * 4


PROGRAM = """
import os, signal, sys
from lora_train.trainer import Trainer
step = Trainer.train_step
def stopped_once(self):
    if self.step == 1 and sys.argv[-1] == "stop" and self.accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
Trainer.train_step = stopped_once
if os.environ["TRITON_INTERPRET"] == "1":
    from lora_train import fusion
    fusion._is_capable = lambda device: True
from lora_train.cli import main
sys.exit(main([word for word in sys.argv[1:] if word != "stop"]))
"""
SHORT = (
    "trainer.max_steps=3", "eval.num_generate=0", "peft.dropout=0", "data.global_batch_size=4",
    "data.seq_length=64", "log.ckpt.every_n_train_steps=1",
)  # fmt: skip


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("val_loss")) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [False, True], ids=["plain", "fused"])
def test_a_sharded_run_learns_what_a_whole_one_does(
    interpreted: bool, words_with: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = (
        os.environ
        | {"LORA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpreted else "0"}
    )

    def run(name: str, num_processes: int, *words: str) -> str:
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(num_processes), str(tmp_path / "program.py"),
                *words_with(*SHORT, f"log.name={name}"), *words,
            ],
            capture_output=True, text=True, timeout=150, check=False, env=environment,
        )  # fmt: skip
        return " ".join(done.stderr.split())

    sharded = ("trainer.strategy=fsdp2", f"kernels.fused={'auto' if interpreted else 'off'}")
    if not interpreted:  # it takes half a minute to begin
        assert "going on" not in run("sharded", 2, *sharded, "stop")
    log = run("sharded", 2, *sharded)
    assert ("going on from" in log) != interpreted, log
    assert "the base model is sharded over 2 devices" in log, log
    assert ("the decoder as a whole" in log) == interpreted
    run("whole", 1, "kernels.fused=off")
    runs = tmp_path / "runs"
    assert len(losses(runs / "whole")) > 3
    assert losses(runs / "sharded") == pytest.approx(losses(runs / "whole"), rel=1e-5)
    files = [runs / name / "adapter/adapter_model.safetensors" for name in ("sharded", "whole")]
    ours, theirs = (load_file(file) for file in files)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)


# --- what the processes do ----------------------------------------------------------------------

DEVICE = torch.device("cpu")
"""Of this process."""
BOUND = 1e-5
"""On differences, relative: one is rounded as the other, but for the order of sums."""


def load_both(folder: str) -> tuple[Any, Any]:
    """The model with its adapter, sharded and whole; every lora_B is random."""
    from lora_train.adapter import attach_adapter
    from lora_train.config import Config, DataConfig, ModelConfig, PeftConfig, TrainerConfig
    from lora_train.model import load_base_model
    from lora_train.sharding import make_mesh

    config = Config(
        model=ModelConfig(path=folder),
        data=DataConfig(path="examples.jsonl"),
        peft=PeftConfig(dim=4),
        trainer=TrainerConfig(strategy="fsdp2"),
    )
    device, dtype = DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    models = []
    for mesh in (make_mesh(config, device, dtype), None):
        torch.manual_seed(0)
        model = attach_adapter(load_base_model(config.model, dtype, device, mesh), config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        models.append(model.train())
    return models[0], models[1]


def make_row() -> dict[str, Any]:
    """A packed row of this process's own."""
    from lora_train.attention import packing_kwargs

    lengths = (7, 1, 9)
    torch.manual_seed(10 + distributed.get_rank())
    tokens = torch.randint(0, 300, (1, sum(lengths)))
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, borders = tokens.to(DEVICE), borders.to(DEVICE)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE),
        "use_cache": False,
        **packing_kwargs("lora_varlen", borders, max(lengths)),
    }


def autocast() -> Any:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def compare(models: tuple[Any, Any], loss_of: Callable[[Any], torch.Tensor]) -> None:
    losses = []
    for model in models:
        model.zero_grad()
        with autocast():
            losses.append(loss_of(model))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=BOUND, atol=BOUND)
    whole = dict(models[1].named_parameters())
    trained = {name: each for name, each in models[0].named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 2 * 7
    for name, parameter in trained.items():
        assert type(parameter.data) is torch.Tensor, name
        assert parameter.grad is not None and whole[name].grad is not None, name
        error = (parameter.grad - whole[name].grad).norm()
        assert error <= BOUND * (whole[name].grad.norm() + 1e-2), f"{name}: {error:.3g}"
    print("same gradients\n", end="", flush=True)


def save_alone(models: tuple[Any, Any], folder: str) -> None:
    """One process saves, without the others, and what it writes is the same as of a whole base."""
    from lora_train.adapter import save_adapter

    if distributed.get_rank() != 0:
        return
    files = []
    for name, model in zip(("sharded", "whole"), models, strict=True):
        save_adapter(model, Path(folder, name))
        files.append(sorted(Path(folder, name).iterdir()))
    for sharded, whole in zip(*files, strict=True):
        assert sharded.read_bytes() == whole.read_bytes(), sharded.name


def work_plain(model_folder: str, folder: str) -> None:
    models = load_both(model_folder)
    row = make_row()
    for _ in range(2):
        compare(models, lambda model: model(**row).loss)
        save_alone(models, folder)
        # and what only looks, between two steps
        with torch.no_grad(), autocast():
            losses = [model(**row).loss for model in models]
        torch.testing.assert_close(*losses, rtol=BOUND, atol=BOUND)
    for model in models:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for _ in range(2):
        compare(models, lambda model: model(**row).loss)


def work_fused(model_folder: str, folder: str) -> None:
    from torch.distributed.tensor import DTensor

    from lora_kernels.peft_bridge import fuse

    models = load_both(model_folder)
    row = make_row()
    fusions = {id(model): fuse(model) for model in models}
    fused = fusions[id(models[0])].decoder
    assert fused is not None, fusions[id(models[0])].decoder_obstacle
    check = fusions[id(models[0])].self_check()
    assert check is not None and check.failures == []
    predicting = torch.tensor([2, 3, 9, 14], device=DEVICE)

    def loss_sum(model: Any) -> torch.Tensor:
        decoder = fusions[id(model)].decoder
        assert decoder is not None and decoder.loss_obstacle_now() is None
        return decoder.loss_sum(
            row["input_ids"], row["position_ids"], row["cu_seq_lens_q"], row["max_length_q"],
            predicting, row["input_ids"][0, predicting + 1],
        )  # fmt: skip

    compare(models, loss_sum)
    save_alone(models, folder)
    with torch.no_grad(), autocast():
        losses = [loss_sum(model) for model in models]
    torch.testing.assert_close(*losses, rtol=BOUND, atol=BOUND)
    # through the hooks of the whole decoder
    compare(models, lambda model: model(**row).loss)
    for model in models:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    compare(models, loss_sum)
    # a steered layer has to count: its hook is not FSDP2's
    layer = models[0].get_base_model().model.layers[1]
    handle = layer.register_forward_hook(lambda module, inputs, output: None)
    assert "has hooks" in str(fused.loss_obstacle_now())
    handle.remove()
    for fusion in fusions.values():
        fusion.undo()
    assert isinstance(layer.self_attn.q_proj.base_layer.weight, DTensor)
    compare(models, lambda model: model(**row).loss)


if __name__ == "__main__":
    DEVICE = torch.device(sys.argv[2])
    if DEVICE.type == "cuda":
        DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(DEVICE)
        BOUND = 1e-2
    distributed.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    {"plain": work_plain, "fused": work_fused}[sys.argv[1]](*sys.argv[3:])
    distributed.destroy_process_group()
