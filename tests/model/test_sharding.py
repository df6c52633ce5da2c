"""Loading a base model part by part: which rows each process reads, and what is refused.

The worker below is started as this file, under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_kernels.peft_obstacles import decoder_obstacle
from lora_kernels.sharded import ShardedLayers
from lora_train import model as model_module
from lora_train.combinations import conflicts
from lora_train.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PeftConfig,
    TrainerConfig,
)
from lora_train.config_loading import load_recipe
from lora_train.errors import UserError
from lora_train.model import load_base_model
from lora_train.sharding import make_mesh, planned_bytes

FSDP2 = TrainerConfig(strategy="fsdp2")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
    "vocab_size": 128256,
}  # fmt: skip


def start(num_processes: int, *folders: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(num_processes), __file__, *map(str, folders),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.slow
def test_shards_together_are_the_model_that_transformers_loads(
    model_folder: Callable[[str], Path],
) -> None:
    """Over three processes: 32 rows of keys and values are 11, 11 and 10."""
    folders = [model_folder(name) for name in ("llama", "llama-tied", "qwen2", "qwen3", "mistral")]
    done = start(3, *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 3 * len(folders)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda weights: weights.update(wq=weights.pop(Q_PROJ)),
            f"1 of its parameters have no weights, first {Q_PROJ}; "
            "1 weights have no parameter, first wq",
        ),
        (
            lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:7]}),
            rf"{Q_PROJ} is \[7, 64\] in .*, config.json means \[64, 64\]",
        ),
    ],
    ids=["names", "shapes"],
)
def test_weights_that_are_not_the_models_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    problem: str,
    model_folder: Callable[[str], Path],
    mesh: DeviceMesh,
    tmp_path: Path,
) -> None:
    source = model_folder("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    change(weights)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=problem) as refusal:
        load_base_model(config, torch.float32, torch.device("cpu"), mesh)
    assert str(refusal.value.hint).startswith("trainer.strategy=ddp with model.quantization=nf4")


def test_quantizing_reads_a_weight_at_a_time(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped files would count as memory of the process until the last weight is loaded."""
    backends = []
    opened = model_module.safe_open

    def record(*args: Any, **kwargs: Any) -> Any:
        backends.append(kwargs["backend"])
        return opened(*args, **kwargs)

    monkeypatch.setattr(model_module, "safe_open", record)
    config = ModelConfig(path=str(model_folder("llama")), quantization="nf4")
    load_base_model(config, torch.float32, torch.device("cpu"))
    # transformers opened the file by what was put in the place of its own
    assert backends == ["pread"]


def test_one_process_shares_with_nobody(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(model=ModelConfig(path="m"), data=DataConfig(path="d"), trainer=FSDP2)
    assert make_mesh(config, torch.device("cpu"), torch.float32) is None
    assert "there is nothing to share" in caplog.text


def test_planned_bytes_of_70b_over_four_gpus() -> None:
    plan = planned_bytes(LLAMA_70B, itemsize=2, num_shards=4)
    assert plan is not None
    # embedding and head 4.2 GB, a quarter of 136.9 GB of matrices
    assert plan.weights == pytest.approx(38.4e9, rel=0.01)
    # of 855 M parameters a layer: one in use, one being gathered, one in the kernels' buffers
    assert plan.working == 3 * 855_638_016 * 2
    assert planned_bytes({"model_type": "gemma3"}, 2, 4) is None


@pytest.mark.parametrize(
    ("sections", "option"),
    [
        ({"model": {"quantization": "nf4"}}, "model.quantization=nf4"),
        ({"peft": {"init": "pissa"}}, "peft.init=pissa"),
        ({"peft": {"init": "olora"}}, "peft.init=olora"),
        ({"peft": {"init": "eva"}}, "peft.init=eva"),
        ({"peft": {"use_dora": True}}, "peft.use_dora=true"),
        ({"peft": {"modules_to_save": ["lm_head"]}}, "peft.modules_to_save=[lm_head]"),
        ({"eval": {"num_generate": 3}}, "eval.num_generate=3"),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code=true"),
        ({"model": {"allow_pickle": True}}, "model.allow_pickle=true"),
        ({"model": {"path": "m.gguf"}}, "model.path=m.gguf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_a_whole_base_is_refused(sections: dict[str, Any], option: str) -> None:
    def config(trainer: TrainerConfig) -> Config:
        return Config(
            model=ModelConfig(**{"path": "m", **sections.get("model", {})}),
            data=DataConfig(path="d"),
            peft=PeftConfig(**sections.get("peft", {})),
            eval=EvalConfig(**sections.get("eval", {})),
            trainer=trainer,
        )

    [found] = conflicts(config(FSDP2))
    assert found.startswith(f"trainer.strategy=fsdp2 with {option}: ")
    assert "; set " in found
    assert conflicts(config(TrainerConfig())) == []


def test_the_recipe_is_sharded() -> None:
    assert load_recipe("llama31_70b_fsdp2")["trainer"]["strategy"] == "fsdp2"


def _shard_one_layer(decoder: Any, mesh: DeviceMesh) -> None:
    fully_shard(decoder.layers[1], mesh=mesh)


def _shard_norms(decoder: Any, mesh: DeviceMesh) -> None:
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)


def _shard_a_part(decoder: Any, mesh: DeviceMesh) -> None:
    fully_shard(decoder.layers[0].self_attn, mesh=mesh)


def _shard_only_some(decoder: Any, mesh: DeviceMesh) -> None:
    for layer in decoder.layers:
        layer_parameters = dict(layer.named_parameters())
        kept = {each for name, each in layer_parameters.items() if "down" in name or "norm" in name}
        fully_shard(layer, mesh=mesh, ignored_params=kept)


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        (_shard_one_layer, "layer 1 and layer 0 are not both sharded"),
        (_shard_norms, "layers.0.input_layernorm.weight is sharded"),
        (_shard_a_part, "layer 0 has a FSDPLlamaAttention"),
        (_shard_only_some, "mlp.down_proj are not sharded as their layer is"),
    ],
)
def test_models_that_are_sharded_otherwise_are_not_fused(
    shard: Callable[[Any, DeviceMesh], None],
    reason: str,
    make_model: Callable[[str], Any],
    mesh: DeviceMesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_kernels.peft_obstacles._device_obstacle", lambda weight: None)
    model = make_model("llama")
    shard(model.model, mesh)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert reason in str(decoder_obstacle(peft_model))


class _Layer:
    """Records what FSDP2 is asked to do."""

    def __init__(self, number: int, said: list[str], whole: set[int]) -> None:
        self.number, self.said, self.whole = number, said, whole

    def unshard(self, async_op: bool = False) -> None:
        if self.number not in self.whole:
            self.said.append(f"{'prefetch' if async_op else 'gather'} {self.number}")
        self.whole.add(self.number)

    def reshard(self) -> None:
        self.whole.discard(self.number)


def test_each_layer_is_gathered_ahead_of_its_turn_and_two_are_whole_at_most() -> None:
    said: list[str] = []
    whole: set[int] = set()
    layers = ShardedLayers([_Layer(number, said, whole) for number in range(5)])  # type: ignore[misc]
    for _ in range(2):
        layers.begin()
        assert not whole
        # several weights of a layer, one after another
        for number in [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]:
            layers.use(number)
            assert number in whole and len(whole) == 2
        assert said == [
            "gather 0", *[f"prefetch {number}" for number in (1, 2, 3, 4)],
            # the backward pass finds 4 and 3 where the forward pass left them
            *[f"prefetch {number}" for number in (2, 1, 0)],
        ]  # fmt: skip
        said.clear()


def test_a_layer_that_something_else_sharded_is_gathered_again() -> None:
    said: list[str] = []
    whole: set[int] = set()
    layers = ShardedLayers([_Layer(0, said, whole)])  # type: ignore[list-item]
    layers.use(0)
    whole.clear()
    layers.use(0)
    assert whole == {0} and said == ["gather 0", "gather 0"]


# --- what the processes do ----------------------------------------------------------------------


def compare(folder: str, dtype: torch.dtype) -> None:
    from torch.distributed.tensor import DTensor

    config = Config(model=ModelConfig(path=folder), data=DataConfig(path="d"), trainer=FSDP2)
    device = torch.device("cpu")
    mesh = make_mesh(config, device, dtype)
    sharded = load_base_model(config.model, dtype, device, mesh)
    whole = load_base_model(config.model, dtype, device)
    assert not sharded.training and not sharded.config.use_cache
    parts = (sharded.named_parameters(), whole.named_parameters())
    for (name, ours), (other_name, theirs) in zip(*parts, strict=True):
        assert name == other_name and not ours.requires_grad
        assert isinstance(ours, DTensor) == (".layers." in name and theirs.ndim == 2), name
        full = ours.full_tensor() if isinstance(ours, DTensor) else ours
        assert torch.equal(full, theirs) and full.dtype == dtype, name
    # those are not in the files: rotary embeddings
    for (name, ours), (_, theirs) in zip(
        sharded.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    is_tied = json.loads(Path(folder, "config.json").read_text())["tie_word_embeddings"]
    assert (sharded.lm_head.weight is sharded.model.embed_tokens.weight) == is_tied
    print("the same\n", end="", flush=True)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for path in sys.argv[1:]:
        # the files hold fp32
        compare(path, torch.bfloat16 if "qwen" in path else torch.float32)
    distributed.destroy_process_group()
