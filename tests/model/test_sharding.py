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
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    GPTJConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

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
from lora_train.sharding import (
    Member,
    check_shardable,
    choose_num_shards,
    make_mesh,
    planned_bytes,
)

FSDP2 = TrainerConfig(strategy="fsdp2")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
    "vocab_size": 128256,
}  # fmt: skip


GIB = 2**30
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "rotary_dim": 8, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def save(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


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
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Over three processes: 32 rows of keys and values are 11, 11 and 10."""
    folders = [model_folder(name) for name in ("llama", "llama-tied", "qwen2", "qwen3", "mistral")]
    # computes its positions itself; has weights that are scalars; names a block and its mixer
    for name, make in (("gptj", GPTJConfig), ("apertus", ApertusConfig), ("mamba", MambaConfig)):
        folders.append(save(tmp_path / name, make(**SMALL)))
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
    assert str(refusal.value.hint).startswith("trainer.strategy=ddp, which holds the model whole")


@pytest.mark.parametrize("size", ["50GB", "1KB"], ids=["one file", "an index"])
def test_a_model_that_is_not_read_as_it_is_stored_is_refused_by_its_names(
    size: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = MixtralConfig(**SMALL, num_local_experts=2)
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(tmp_path, max_shard_size=size)

    def check(folder: Path, trainer: TrainerConfig = FSDP2) -> None:
        model = ModelConfig(path=str(folder))
        check_shardable(Config(model=model, data=DataConfig(path="d"), trainer=trainer))

    check(tmp_path)  # alone, it loads the model as any other
    monkeypatch.setattr("lora_train.sharding._world_size", lambda: 2)
    with pytest.raises(UserError, match=r"type 'mixtral' is not read .* of model\.layers\."):
        check(tmp_path)
    check(tmp_path, TrainerConfig())
    check(model_folder("llama"))


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


def test_a_transformers_that_opens_files_in_another_way_loads_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("transformers.modeling_utils.safe_open")
    with model_module._reading_weights():
        pass
    assert "stay mapped" in caplog.text


@pytest.mark.parametrize(
    ("quantization", "hint"),
    [(None, "set model.quantization=nf4"), ("nf4", "set model.quantization=null")],
)
def test_the_hint_for_a_full_gpu_names_what_is_not_set_yet(
    quantization: Any, hint: str, model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fill(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(model_module.AutoModelForCausalLM, "from_pretrained", fill)
    config = ModelConfig(path=str(model_folder("llama")), quantization=quantization)
    with pytest.raises(UserError, match="does not fit") as refusal:
        load_base_model(config, torch.float32, torch.device("cpu"))
    assert str(refusal.value.hint).startswith(hint)


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


def members(*hosts: str, memory: int = 80 * GIB, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    return [Member(host, dtype, memory) for host in hosts]


def test_a_node_shares_a_model_of_its_own_where_it_fits_on_the_smallest_gpu() -> None:
    model, llama_8b = ModelConfig(path="m"), LLAMA_70B | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32,
    }  # fmt: skip
    pairs = members("a", "a", "b", "b")
    assert choose_num_shards(pairs, llama_8b, model) == 2
    assert choose_num_shards(members("a", "a", "b"), llama_8b, model) == 3
    # too small, and another process's
    pairs[3] = pairs[3]._replace(memory=12 * GIB)
    assert choose_num_shards(pairs, llama_8b, model) == 4
    assert choose_num_shards(members("a", "b", memory=0), llama_8b, model) == 2


def test_gpus_that_compute_in_different_dtypes_are_refused() -> None:
    both = [*members("a", "a"), *members("b", dtype=torch.float32)]
    with pytest.raises(UserError, match="bfloat16 on a; float32 on b") as refusal:
        choose_num_shards(both, LLAMA_70B, ModelConfig(path="m"))
    assert "trainer.precision=fp32" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("memory", "hint"),
    [
        (48, "ask Slurm for 4 such GPUs or more; or trainer.strategy=ddp model.quantization=nf4"),
        (24, "ask Slurm for 9 such GPUs or more"),
        (3, "ask Slurm for GPUs with more memory"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(memory: int, hint: str) -> None:
    gpus = members("a", "a", memory=80 * GIB)
    gpus[1] = gpus[1]._replace(memory=memory * GIB)
    with pytest.raises(UserError, match=rf"67.7 GiB .* the smallest has {memory}.0") as refusal:
        choose_num_shards(gpus, LLAMA_70B, ModelConfig(path="m"))
    assert str(refusal.value.hint).startswith(hint)


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
        is_in_layer = ".layers." in name or ".h." in name
        assert isinstance(ours, DTensor) == (is_in_layer and theirs.ndim > 1), name
        full = ours.full_tensor() if isinstance(ours, DTensor) else ours
        assert torch.equal(full, theirs) and full.dtype == dtype, name
    # those are not in the files: rotary embeddings
    for (name, ours), (_, theirs) in zip(
        sharded.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    assert sharded.config.dtype == whole.config.dtype
    is_tied = json.loads(Path(folder, "config.json").read_text())["tie_word_embeddings"]
    assert (sharded.lm_head.weight is sharded.get_input_embeddings().weight) == is_tied
    print("the same\n", end="", flush=True)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for path in sys.argv[1:]:
        # the files hold fp32
        is_bf16 = any(name in path for name in ("qwen", "gptj", "apertus"))
        compare(path, torch.bfloat16 if is_bf16 else torch.float32)
    distributed.destroy_process_group()
