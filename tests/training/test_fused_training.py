"""Training with the fused kernels, in Triton's interpreter, beside training without them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_train import fusion
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.fusion import check_device, fuse_model

Start = Callable[..., "subprocess.Popen[str]"]

# as if there were a GPU; where there is one, it is hidden: the interpreter works on the CPU
INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from lora_train import fusion
fusion._is_capable = lambda device: True
"""
STOPPED_AT_2 = """
import os, signal
from lora_train.trainer import Trainer
step = Trainer.train_step
def interrupted(self):
    if self.step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
Trainer.train_step = interrupted
"""
SHORT = (
    "trainer.max_steps=4", "trainer.limit_val_batches=1", "eval.num_generate=0",
    "log.ckpt.every_n_train_steps=2", "data.seq_length=64",
)  # fmt: skip


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_fused_run_learns_what_a_plain_one_does(lora_train: Start, tmp_path: Path) -> None:
    options = [*SHORT, "peft.dropout=0"]
    fused = lora_train(*options, "log.name=fused", code=INTERPRETED)
    _, log = fused.communicate()
    assert fused.returncode == 0, log
    assert "14 adapted layers are fused, the decoder as a whole; checked" in " ".join(log.split())
    plain = lora_train(*options, "log.name=plain", "kernels.fused=off")
    assert plain.wait() == 0
    found = losses(tmp_path / "runs/fused")
    assert len(found) == 4
    assert found == pytest.approx(losses(tmp_path / "runs/plain"), rel=1e-5)


@pytest.mark.slow
def test_a_fused_run_in_two_parts_ends_with_the_same_bytes(
    lora_train: Start, tmp_path: Path
) -> None:
    """With dropout, whose seeds come from the generator that the checkpoint keeps."""
    statuses = []
    for name, code in (("whole", ""), ("parts", STOPPED_AT_2), ("parts", "")):
        process = lora_train(*SHORT, f"log.name={name}", code=INTERPRETED + code)
        process.communicate()
        statuses.append(process.returncode)
    assert statuses == [0, 75, 0]
    adapters = [tmp_path / "runs" / name / "adapter" for name in ("whole", "parts")]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in adapters]
    assert weights[0] == weights[1]


def test_required_without_a_gpu_is_refused(config_of: Callable[..., Config]) -> None:
    config = config_of("kernels.fused=required", "trainer.precision=auto")
    with pytest.raises(UserError, match="they need an NVIDIA GPU, the model is on the CPU"):
        check_device(config, torch.device("cpu"))
    check_device(config, torch.device("cuda"))
    check_device(config_of(), torch.device("cpu"))


def test_a_failed_check_falls_back_and_says_why(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    undone = []
    fake = SimpleNamespace(
        decoder=SimpleNamespace(),
        fused=["a"],
        self_check=lambda: SimpleNamespace(failures=["the output is off by 1"], seconds=0.1),
        undo=lambda: undone.append(True),
    )
    monkeypatch.setattr(fusion, "_is_capable", lambda device: True)
    monkeypatch.setattr("lora_kernels.peft_bridge.fuse", lambda model: fake)
    assert fuse_model(SimpleNamespace(), config_of(), torch.device("cpu")) is None  # type: ignore[arg-type]
    assert undone
    assert "do not compute what torch does: the output is off by 1" in caplog.text
    with pytest.raises(UserError, match="kernels.fused=required"):
        fuse_model(
            SimpleNamespace(),  # type: ignore[arg-type]
            config_of("kernels.fused=required", "trainer.precision=auto"),
            torch.device("cpu"),
        )


def test_other_architectures_are_fused_layer_by_layer_and_the_rest_is_named(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    fake = SimpleNamespace(
        decoder=None,
        decoder_obstacle="GemmaModel is not of the Llama family",
        fused=["a"],
        unfused={f"layers.{n}.q_proj": "it is a DoRA layer" for n in range(5)},
        undo=lambda: None,
    )
    monkeypatch.setattr(fusion, "_is_capable", lambda device: True)
    monkeypatch.setattr("lora_kernels.peft_bridge.fuse", lambda model: fake)
    with caplog.at_level("INFO"):
        found = fuse_model(SimpleNamespace(), config_of(), torch.device("cpu"))  # type: ignore[arg-type]
    assert found is fake
    assert "layers.2.q_proj and 2 more: it is a DoRA layer" in caplog.text
    with pytest.raises(UserError, match="it is a DoRA layer"):
        fuse_model(
            SimpleNamespace(),  # type: ignore[arg-type]
            config_of("kernels.fused=required", "trainer.precision=auto"),
            torch.device("cpu"),
        )


def test_required_is_refused_beside_what_is_never_fused(config_of: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"kernels.fused=required with peft.use_dora=true"):
        config_of("kernels.fused=required", "peft.use_dora=true", "trainer.precision=auto")
