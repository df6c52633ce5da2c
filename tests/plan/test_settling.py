"""What `auto` becomes, and that it stays what it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lora_train.assembly import settle_settings
from lora_train.config import Config
from lora_train.config_loading import resolve, to_yaml
from lora_train.errors import UserError
from lora_train.known_models import MODELS
from lora_train.plan.fitting import cannot_fit, fit, least_of, steps_of
from lora_train.plan.settling import Settings, has_auto, settle
from lora_train.ranks import Ranks
from lora_train.rendezvous import Group
from lora_train.run_directory import RunDirectory

EIGHT = "meta-llama/Llama-3.1-8B"
GIB = 2**30
A100_40, H100 = round(39.4 * GIB), round(79.2 * GIB)


def config_of(**keys: str) -> Config:
    overrides = {name.replace("__", "."): value for name, value in keys.items()}
    return resolve(factory="llama31_8b", overrides=overrides)


def settled(
    config: Config,
    memory: int | None,
    name: str = "NVIDIA H100 80GB HBM3",
    before: Settings | None = None,
    num_gpus: int = 1,
) -> Config:
    return settle(
        config, MODELS[EIGHT],
        num_gpus=num_gpus, memory_bytes=memory, gpu_name=name, before=before,
    )  # fmt: skip


def chosen(config: Config) -> Settings:
    assert not has_auto(config)
    size, checkpointing = config.data.micro_batch_size, config.trainer.gradient_checkpointing
    assert size != "auto" and checkpointing != "auto"
    return Settings(size, checkpointing)


def test_auto_takes_what_fits_and_is_fast() -> None:
    small, large = (
        settled(config_of(), A100_40, "NVIDIA A100-SXM4-40GB"),
        settled(config_of(), H100),
    )
    for config, memory in ((small, A100_40), (large, H100)):
        [step] = steps_of(config, MODELS[EIGHT], 1)
        assert fit(step).fits(memory)
        assert config.data.global_batch_size % step.num_sequences == 0
    # one sequence at a time leaves an H100 waiting for the host
    assert large.data.micro_batch_size != 1
    assert large.trainer.gradient_checkpointing is False


def test_auto_checkpoints_where_nothing_else_fits() -> None:
    config = config_of(data__seq_length="16384", data__global_batch_size="2")
    assert settled(config, A100_40).trainer.gradient_checkpointing is True
    assert settled(config, H100).trainer.gradient_checkpointing is False


def test_auto_leaves_alone_what_is_set() -> None:
    config = settled(config_of(data__micro_batch_size="2"), H100)
    assert config.data.micro_batch_size == 2
    config = settled(config_of(trainer__gradient_checkpointing="true"), H100)
    assert config.trainer.gradient_checkpointing is True


def test_auto_on_a_cpu_is_the_least() -> None:
    config = settled(config_of(), None)
    assert (config.data.micro_batch_size, config.trainer.gradient_checkpointing) == (1, False)


def test_auto_of_an_unknown_model_is_the_least(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = settle(
        config_of(), {"model_type": "gptj"}, num_gpus=1, memory_bytes=H100, gpu_name="x"
    )
    assert (config.data.micro_batch_size, config.trainer.gradient_checkpointing) == (1, False)
    assert "gptj" in caplog.text


def test_what_cannot_fit_is_refused_with_words_that_mend_it() -> None:
    with pytest.raises(UserError, match=r"needs 1\d\.\d GiB .* has 12\.0") as refused:
        settled(config_of(), 12 * GIB, "a small GPU")
    assert "model.quantization=nf4" in str(refused.value.hint)
    assert settled(config_of(model__quantization="nf4"), 12 * GIB) is not None


def test_a_run_that_goes_on_keeps_its_settings() -> None:
    fresh = chosen(settled(config_of(), H100))
    other = Settings(4, True)
    assert fresh != other
    assert chosen(settled(config_of(), H100, before=other)) == other
    # also where the memory is not asked
    assert chosen(settled(config_of(), None, before=other)) == other
    # and what is set, is set
    config = settled(config_of(data__micro_batch_size="2"), H100, before=other)
    assert chosen(config) == Settings(2, True)


def test_settings_that_do_not_fit_here_are_changed_and_it_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = Settings(8, False)
    assert chosen(settled(config_of(), H100, before=before)) == before
    assert "other bits" not in caplog.text
    now = settled(config_of(), A100_40, "NVIDIA A100-SXM4-40GB", before=before)
    assert least_of(now, MODELS[EIGHT], 1).fits(A100_40)
    assert "other bits" in caplog.text and "data.micro_batch_size=8" in caplog.text


def test_settings_of_other_gpus_are_not_kept() -> None:
    before = Settings(16, True)  # of 16 sequences a step
    assert chosen(settled(config_of(), H100, before=before)) == before
    assert chosen(settled(config_of(), H100, before=before, num_gpus=4)).micro_batch_size <= 4


def test_an_older_run_decided_nothing() -> None:
    assert Settings.recorded({"data": {"micro_batch_size": "auto"}, "trainer": {}}) is None
    recorded = {"data": {"micro_batch_size": 2}, "trainer": {"gradient_checkpointing": False}}
    assert Settings.recorded(recorded) == Settings(2, False)


def test_what_an_earlier_part_recorded_is_found(tmp_path: Path) -> None:
    auto = {"data.micro_batch_size": "auto", "data.global_batch_size": "4"}
    config = resolve(factory="quickstart", overrides=auto)
    assert config.trainer.gradient_checkpointing == "auto"
    before = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, micro_batch_size=2),
        trainer=dataclasses.replace(config.trainer, gradient_checkpointing=True),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(before))
    group, device = Group(Ranks()), torch.device("cpu")
    new = RunDirectory(tmp_path, None, None)
    assert chosen(settle_settings(config, device, group, new)) == Settings(1, False)
    gone_on_with = dataclasses.replace(new, checkpoint=object())  # type: ignore[arg-type]
    assert chosen(settle_settings(config, device, group, gone_on_with)) == Settings(2, True)


def test_what_may_fit_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    """The examples may be shorter than data.seq_length, and few of their tokens be learned."""
    long = {"data__seq_length": "65536", "data__global_batch_size": "1"}
    config = config_of(**long, data__packed_sequence="false")
    memory = 20 * GIB
    assert not least_of(config, MODELS[EIGHT], 1).fits(memory)
    assert chosen(settled(config, memory)) == Settings(1, True)
    assert "may run out of memory" in caplog.text
    # the weights alone are too large
    with pytest.raises(UserError, match="GiB of GPU memory"):
        settled(config, 12 * GIB)


def test_a_base_shared_within_each_node_takes_more() -> None:
    config = config_of(trainer__strategy="fsdp2")
    of_node, of_all = (least_of(config, MODELS[EIGHT], 8, shards) for shards in (4, None))
    share = 2 * of_node.step.shape.matrices
    assert of_node.peak_bytes - of_all.peak_bytes == pytest.approx(share / 4 - share / 8, rel=0.01)


@pytest.mark.parametrize(
    ("keys", "memory", "is_refused"),
    [
        ({"kernels__fused": "off"}, 28, False),  # if few tokens are learned
        ({"kernels__fused": "off"}, 26, True),
        ({"data__micro_batch_size": "4"}, 30, False),  # if packs are half full
        ({"data__micro_batch_size": "4"}, 25, True),
        ({"data__micro_batch_size": "4", "data__packed_sequence": "false"}, 25, False),
    ],
)
def test_only_what_is_certain_is_called_impossible(
    keys: dict[str, str], memory: int, is_refused: bool
) -> None:
    keys = {"data__micro_batch_size": "2", "trainer__gradient_checkpointing": "false", **keys}
    config = config_of(**keys)
    assert not least_of(config, MODELS[EIGHT], 1).fits(memory * GIB)
    assert cannot_fit(config, MODELS[EIGHT], 1, memory * GIB) == is_refused
