"""`lora-train plan`, as it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_train import cli
from lora_train.commands import plan as plan_command
from lora_train.gpu_specs import gpu_spec
from lora_train.known_models import MODELS
from lora_train.plan.planning import Target

ONE = MODELS["meta-llama/Llama-3.2-1B"]


def test_the_command_shows_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--factory", "llama31_8b", "--max-steps", "250"]) == 0
    out = capsys.readouterr().out
    for word in ("8.03 B parameters", "frozen weights", "A100-40", "H100-80", "250 steps", "GPU-h"):
        assert word in out


def test_the_command_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--factory", "llama31_8b", "--max-steps", "250", "--json"]
    assert cli.main(["plan", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_bytes"] == sum(plan["parts_bytes"].values())
    h100 = next(each for each in plan["on"] if each["gpu"] == "H100-80")
    assert h100["run_seconds"] == pytest.approx(250 * h100["step_seconds"])


def test_a_run_that_fits_nowhere_ends_with_2_and_says_what_would_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--factory", "llama31_70b_qlora", "model.quantization=null"]
    assert cli.main(["plan", *words]) == 2
    assert "model.quantization=nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe"], "no NVIDIA GPU here"),
        (["--probe", "trainer.precision=fp32"], "bf16"),
        (["--gpus", "3"], "does not divide"),
        (["--gpus", "0"], "expected at least 1"),
        (["data.seq_lenght=5"], "seq_length"),
    ],
)
def test_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--factory", "llama31_8b", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gptj", "n_layer": 2}')
    assert cli.main(["plan", f"model.path={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "'gptj'" in error and "llama" in error


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from lora_train import cli; cli.main(['plan', '--factory', 'llama31_8b']);"
        "sys.exit(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def write_model(folder: Path, content: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return f"model.path={folder}"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": {"all": 16}},
        {"num_attention_heads": 0},
        {"hidden_size": -2048},
        {"vocab_size": None},
        {"vocab_size": float("inf")},
    ],
    ids=str,
)
def test_a_config_that_says_no_sizes_is_refused(
    change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", write_model(tmp_path / "a model", {**ONE, **change})]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "config.json cannot be read"),
        ({"model_type": "mistral3", "text_config": {**ONE, "model_type": "mistral"}}, "'mistral3'"),
        ({**ONE, "quantization_config": {"quant_method": "awq"}}, "already quantized (awq)"),
    ],
    ids=["no object", "of several kinds", "quantized"],
)
def test_a_model_that_no_plan_is_known_for(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", write_model(tmp_path / "model", content)]) == 2
    assert message in capsys.readouterr().err


def test_numbers_may_be_written_as_others_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floats = {key: float(size) if type(size) is int else size for key, size in ONE.items()}
    parameters = []
    for content in (ONE, floats, {**ONE, "text_config": None}):
        words = [write_model(tmp_path / "model", content), "--json"]
        assert cli.main(["plan", "--factory", "llama32_1b", *words]) == 0
        parameters.append(json.loads(capsys.readouterr().out)["parameters"])
    assert len(set(parameters)) == 1


def test_it_fits_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "NVIDIA H100 80GB HBM3"
    here = Target(f"{name} (here)", gpu_spec(name), 79 * 2**30, is_here=True)
    monkeypatch.setattr(plan_command, "_gpu_here", lambda: here)
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--factory", "llama31_70b_qlora", "--max-steps", "100000"]
    assert cli.main(["plan", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    # a line that may be pasted is not broken
    assert all(len(line.rstrip()) <= 80 for line in lines if not line.startswith("A100-40: "))
    # each GPU stands on a line of its own
    assert sum(line.startswith(f"{name} (here) ") for line in lines) == 2


def test_a_sharded_run_that_does_not_fit_says_how_many_gpus_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "--factory", "llama31_70b_fsdp2"]) == 2
    assert "H100-80: 4 GPUs" in capsys.readouterr().out
    assert cli.main(["plan", "--factory", "llama31_70b_fsdp2", "--gpus", "4"]) == 0
