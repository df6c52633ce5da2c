import subprocess
import sys

import pytest

from lora_train.combinations import conflicts
from lora_train.config import (
    Config,
    DataConfig,
    LogConfig,
    LrSchedulerConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    TrainerConfig,
)


def config(model=None, peft=None, optim=None, scheduler=None, trainer=None, log=None):
    return Config(
        model=ModelConfig(**{"path": "m", **(model or {})}),
        data=DataConfig(path="d"),
        peft=PeftConfig(**(peft or {})),
        optim=OptimConfig(**(optim or {}), lr_scheduler=LrSchedulerConfig(**(scheduler or {}))),
        trainer=TrainerConfig(**(trainer or {})),
        log=LogConfig(**(log or {})),
    )


NF4 = {"quantization": "nf4"}


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"model": NF4, "peft": {"init": "pissa"}}, "peft.init=pissa with model.quantization=nf4"),
        ({"model": NF4, "peft": {"init": "olora"}}, "peft.init=olora with model.quantization=nf4"),
        ({"peft": {"init": "loftq"}}, "peft.init=loftq without model.quantization=nf4"),
        (
            {"model": {**NF4, "allow_pickle": True}, "peft": {"init": "loftq"}},
            "peft.init=loftq with model.allow_pickle=true",
        ),
        (
            {"model": NF4, "peft": {"init": "loftq", "use_dora": True}},
            "peft.init=loftq with peft.use_dora=true",
        ),
        ({"peft": {"init": "orthogonal", "dim": 3}}, "peft.init=orthogonal with rank 3 in"),
        (
            {"peft": {"init": "orthogonal", "rank_pattern": {"q_proj": 5, "v_proj": 7}}},
            "peft.init=orthogonal with rank 5, 7 in",
        ),
        ({"peft": {"init": "pissa", "dropout": 0.1}}, "peft.init=pissa with peft.dropout=0.1"),
        (
            {"optim": {"loraplus_lr_ratio": 16.0}, "peft": {"use_dora": True}},
            "optim.loraplus_lr_ratio=16 with peft.use_dora=true",
        ),
        ({"scheduler": {"min_lr": 1e-3}}, "optim.lr_scheduler.min_lr=0.001 with optim.lr=0.0002"),
        (
            {"scheduler": {"min_lr": 0.0, "name": "linear"}},
            "optim.lr_scheduler.min_lr=0 with optim.lr_scheduler.name=linear",
        ),
        (
            {"peft": {"modules_to_save": ["q_proj", "lm_head"]}},
            "peft.modules_to_save and peft.target_modules both name q_proj",
        ),
        (
            {"model": {"path": "a.gguf", "revision": "main"}},
            "model.revision=main with model.path=a.gguf",
        ),
        (
            {"peft": {"rank_pattern": {"[": 4}}},
            "peft.rank_pattern: '[' is no regular expression: unterminated character set",
        ),
        ({"peft": {"alpha_pattern": {"*q": 4}}}, "peft.alpha_pattern: '*q' is no regular"),
        ({"log": {"name": ".."}}, "log.name=..: expected the name of one folder"),
        ({"log": {"name": "a/b"}}, "log.name=a/b: expected the name of one folder"),
    ],
)
def test_refused_with_names_and_a_reason(sections, names):
    (message,) = conflicts(config(**sections))
    assert message.startswith(names)
    assert ": " in message


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": NF4},
        {"model": NF4, "peft": {"init": "loftq"}},
        {"model": NF4, "peft": {"init": "eva", "use_dora": True}},
        {"peft": {"init": "pissa", "use_dora": True, "use_rslora": True, "rank_pattern": {"q": 4}}},
        {"optim": {"name": "adamw_8bit", "loraplus_lr_ratio": 16.0}},
        {"scheduler": {"warmup_steps": 9, "min_lr": 0.0}, "trainer": {"max_steps": 10}},
    ],
)
def test_accepted(sections):
    assert conflicts(config(**sections)) == []


def test_needs_no_torch():
    code = "import sys, lora_train.combinations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
