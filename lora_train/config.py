"""The configuration schema: frozen dataclasses, one per section.

Every field is followed by a docstring, which `lora-train --help` shows.
Sections and names follow NVIDIA NeMo's recipes, so that a NeMo command line keeps its meaning.
Values are validated in `config_loading.py`; everything else may trust a `Config` it is handed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

_STRICT = {"extra": "forbid", "allow_inf_nan": False}

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0.0)]
NonNegativeFloat = Annotated[float, Ge(0.0)]
Fraction = Annotated[float, Ge(0.0), Lt(1.0)]
Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    __pydantic_config__ = _STRICT

    path: Text
    """Base model: a local Hugging Face folder, a hub name (org/name), or a .gguf file."""
    revision: Text | None = None
    """Commit, tag or branch of the hub model. null: the hub's default branch."""
    quantization: Literal["nf4"] | None = None
    """Hold the frozen base in 4-bit NormalFloat (QLoRA, bitsandbytes). null: not quantized."""
    double_quantization: bool = True
    """Quantize the nf4 scales too (0.4 bit less per weight). Only read with quantization=nf4."""
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    """Attention. auto: varlen (no padding, no mask) where the model takes it, else sdpa."""
    chat_template: Text | None = None
    """File with a Jinja chat template. null: the template that comes with the model."""
    trust_remote_code: bool = False
    """Run Python code that the model repository brings along. Off: such a model is refused."""
    allow_pickle: bool = False
    """Load pickled (.bin) weights, which can run code. Off: safetensors only."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation examples."""

    __pydantic_config__ = _STRICT

    path: Text
    """Examples: a file (.jsonl .json .csv .parquet), a folder, or a hub dataset name."""
    subset: Text | None = None
    """Configuration name of a hub dataset that has several."""
    revision: Text | None = None
    """Commit, tag or branch of the hub dataset. null: the hub's default branch."""
    train_split: Text = "train"
    """Split to train on. A NeMo folder's `training.jsonl` is its train split."""
    validation_path: Text | None = None
    """File of validation examples. null: the validation split of `data.path`, if it has one."""
    validation_split: Text | None = None
    """Split to validate on. null: validation, valid, val, dev, eval or test, if it exists."""
    validation_size: Fraction = 0.05
    """Fraction of the training examples held out when no validation data is found. 0: none."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "input_output", "text"
    ] = "auto"
    """Form of a row. auto: told by its keys, and named in the log."""
    train_on: Literal["answers", "all"] = "answers"
    """Tokens that count in the loss: the answers with their end of turn, or every token."""
    add_bos: bool | None = None
    """Begin raw text with BOS. null: as the tokenizer does. Chat templates decide themselves."""
    seq_length: Annotated[int, Ge(8)] = 2048
    """Longest sequence, and the length that packs are filled to, in tokens."""
    packed_sequence: bool = True
    """Pack several examples into one sequence, with isolated attention and restarted positions."""
    overlong: Literal["auto", "drop", "truncate"] = "auto"
    """Examples over seq_length: drop; truncate (raw formats); auto drops, refuses over 5 %."""
    global_batch_size: PositiveInt = 16
    """Sequences (packs, when packing) per optimizer step, over all devices."""
    micro_batch_size: PositiveInt | Literal["auto"] = 1
    """Sequences per forward pass on one device; the rest is accumulated. auto: by GPU memory."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The adapter: W + (alpha / dim) B A, with W frozen."""

    __pydantic_config__ = _STRICT

    dim: PositiveInt = 16
    """LoRA rank r."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha; the update is scaled by alpha / dim."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: Literal["all-linear"] | Annotated[list[Text], MinLen(1)] = field(
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]
    )  # fmt: skip
    """Linear layers that get an adapter, by the end of their names; NeMo's names are understood."""
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    """Ranks that differ from `dim`: name pattern to rank."""
    alpha_pattern: dict[str, PositiveFloat] = field(default_factory=dict)
    """Alphas that differ from `alpha`: name pattern to alpha."""
    modules_to_save: list[Text] = field(default_factory=list)
    """Modules trained in full and saved with the adapter, such as lm_head."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"] = "default"
    """How A and B start. default: A Kaiming-uniform, B zero (the model starts unchanged)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(dim) instead (rank-stabilized LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Decompose the update into magnitude and direction (DoRA, arXiv 2402.09353)."""


@dataclass(frozen=True, kw_only=True)
class LrSchedulerConfig:
    """Learning rate over the run."""

    __pydantic_config__ = _STRICT

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of linear warm-up. null: warmup_ratio of the run."""
    warmup_ratio: Fraction = 0.03
    """Warm-up as a fraction of all steps. Set, it replaces a recipe's warmup_steps."""
    min_lr: NonNegativeFloat | None = None
    """Learning rate at the end of the cosine. null: a tenth of optim.lr."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer of the adapter weights."""

    __pydantic_config__ = _STRICT

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: torch, fp32 states. adamw_8bit: bitsandbytes, states in 8 bit."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's denominator guard."""
    loraplus_lr_ratio: Annotated[float, Ge(1.0)] | None = None
    """LoRA+ (arXiv 2402.12354): learning rate of B over that of A, commonly 16. null: the same."""
    lr_scheduler: LrSchedulerConfig = LrSchedulerConfig()
    """Learning rate over the run."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The run: length, devices, precision, validation."""

    __pydantic_config__ = _STRICT

    max_steps: PositiveInt | None = None
    """Optimizer steps of the whole run. null: max_epochs decides."""
    max_epochs: PositiveFloat = 1.0
    """Passes over the training examples, in whole steps. Set, it replaces a recipe's max_steps."""
    devices: PositiveInt | Literal["auto"] = "auto"
    """GPUs per node, such as 2 or a100:2. auto: those that the job has, with a process for each."""
    num_nodes: PositiveInt | Literal["auto"] = "auto"
    """Nodes of the job. auto: those that Slurm started this on."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """The frozen base: ddp: whole on every GPU; fsdp2: each GPU holds a part of every layer."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the model. auto: bf16 where the device computes it natively, else fp32."""
    gradient_clip_val: PositiveFloat | None = 1.0
    """Largest norm of all gradients together; longer ones are scaled down. null: no clipping."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, more time. auto: where it must."""
    val_check_interval: PositiveInt | None = None
    """Optimizer steps between validations. null: a tenth of the run."""
    limit_val_batches: NonNegativeInt | None = None
    """Most micro-batches per validation and device. null: all; 0: no validation."""
    log_every_n_steps: PositiveInt = 1
    """Optimizer steps between lines in metrics.jsonl and the trackers."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 1234
    """Seed of adapter initialization, dropout, packing and data order."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """The fused LoRA kernels."""

    __pydantic_config__ = _STRICT

    fused: Literal["auto", "off", "required"] = "auto"
    """auto: fuse what fits on a capable GPU and say what does not. required: refuse if any."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Answers generated for held-out examples, before and after training."""

    __pydantic_config__ = _STRICT

    num_generate: NonNegativeInt = 0
    """Held-out examples answered greedily and compared with the reference. 0: none."""
    max_new_tokens: PositiveInt = 128
    """Longest generated answer, in tokens."""
    batch_size: PositiveInt = 32
    """Examples generated at once."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints inside the run directory."""

    __pydantic_config__ = _STRICT

    every_n_train_steps: PositiveInt | None = 50
    """Optimizer steps between checkpoints. null: only at the end and when asked to stop."""
    keep_last: PositiveInt = 2
    """Complete checkpoints kept; older ones are deleted after a newer one is complete."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the run writes, and what it reports to."""

    __pydantic_config__ = _STRICT

    log_dir: Text = "runs"
    """Folder that holds the run directories."""
    name: Text | None = None
    """Name of the run directory. null: the recipe's name."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers that get the metrics besides metrics.jsonl."""
    online: bool = False
    """Let wandb, mlflow and trackio reach the network. Off: they write into the run directory."""
    ckpt: CheckpointConfig = CheckpointConfig()
    """Checkpoints inside the run directory."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """What to do when the run directory already holds a run."""

    __pydantic_config__ = _STRICT

    mode: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint. never: start over in a new run directory."""
    requeue: bool = False
    """Queue the Slurm job again when its time ends or it is preempted, and go on from there."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, resolved: recipe, configuration file and command line merged and checked."""

    __pydantic_config__ = _STRICT

    model: ModelConfig
    """The frozen base model."""
    data: DataConfig
    """Training and validation examples."""
    peft: PeftConfig = PeftConfig()
    """The adapter: W + (alpha / dim) B A, with W frozen."""
    optim: OptimConfig = OptimConfig()
    """The optimizer of the adapter weights."""
    trainer: TrainerConfig = TrainerConfig()
    """The run: length, devices, precision, validation."""
    kernels: KernelsConfig = KernelsConfig()
    """The fused LoRA kernels."""
    eval: EvalConfig = EvalConfig()
    """Answers generated for held-out examples, before and after training."""
    log: LogConfig = LogConfig()
    """Where the run writes, and what it reports to."""
    resume: ResumeConfig = ResumeConfig()
    """What to do when the run directory already holds a run."""
