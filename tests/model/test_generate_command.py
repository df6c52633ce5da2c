"""`lora-train generate` on a tiny model and adapter, as run() and as a process."""

import copy
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch

from lora_train.adapter import attach_adapter, save_adapter
from lora_train.commands import generate
from lora_train.config_loading import to_yaml
from lora_train.errors import UserError
from lora_train.model import load_base_model


@pytest.fixture
def run_folder(make_config, tmp_path):
    config = make_config()
    torch.manual_seed(0)
    model = attach_adapter(
        load_base_model(config.model, torch.float32, torch.device("cpu")), config
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "run"
    save_adapter(model, folder / "adapter")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def printed(capsys, *words):
    status = generate.run([str(word) for word in words])
    assert status == 0
    return capsys.readouterr()


def test_prompt_side_by_side(run_folder, capsys):
    out = printed(
        capsys, run_folder, "--prompt", "hello", "--which", "both", "--max-new-tokens", 8
    ).out
    heading, base, other_heading, adapter = out.splitlines()
    assert (heading, other_heading) == ("--- base", "--- adapter")
    assert base != adapter
    alone = printed(capsys, run_folder, "--prompt", "hello", "--max-new-tokens", 8).out
    assert alone.splitlines() == [adapter]
    of_base = printed(
        capsys, run_folder, "--prompt", "hello", "--which", "base", "--max-new-tokens", 8
    ).out
    assert of_base.splitlines() == [base]


def test_files_of_prompts(run_folder, tmp_path, capsys):
    text = tmp_path / "prompts.txt"
    text.write_text("hello\n\nyou there\n")
    captured = printed(capsys, run_folder, "--input", text, "--max-new-tokens", 8)
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(row) for row in rows] == [["prompt", "answer"]] * 2
    assert [row["prompt"] for row in rows] == ["hello", "you there"]
    assert "answered 2 of 2" in captured.err

    jsonl = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer"}]
    lines = [{"messages": turns}, {"prompt": "hello"}, {"input": "hello", "output": "x"}]
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    captured = printed(
        capsys, run_folder, "--input", jsonl, "--which", "both", "--max-new-tokens", 8
    )
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(row) for row in answers] == [["prompt", "base", "adapter"]] * 3
    assert {row["adapter"] for row in answers} == {rows[0]["answer"]}


def test_system_message_of_the_run(run_folder, capsys):
    plain = printed(capsys, run_folder, "--prompt", "hello", "--max-new-tokens", 8)
    (run_folder / "summary.json").write_text(json.dumps({"system": "be brief"}))
    captured = printed(capsys, run_folder, "--prompt", "hello", "--max-new-tokens", 8)
    assert "system message of the run: be brief" in captured.err
    assert captured.out != plain.out
    without = printed(
        capsys, run_folder, "--prompt", "hello", "--system", "", "--max-new-tokens", 8
    )
    assert without.out == plain.out


def test_chat_remembers_until_reset(run_folder, capsys, monkeypatch):
    typed = "hello\n\nhello\n/reset\nhello\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    first, second, third = printed(capsys, run_folder, "--max-new-tokens", 8).out.splitlines()
    assert first == third != second


def test_model_and_adapter_without_a_run(run_folder, model_folder, capsys):
    words = ["--prompt", "hello", "--max-new-tokens", 8]
    by_run = printed(capsys, run_folder, *words).out
    model = ["--model", model_folder("llama")]
    assert printed(capsys, *model, "--adapter", run_folder / "adapter", *words).out == by_run
    assert printed(capsys, *model, *words).out != by_run


def test_a_base_model_without_template_continues_the_text(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    speaker = generate.Speaker(model=None, tokenizer=bare, options=None)
    ids = speaker.prompt_ids([{"role": "user", "content": "abc"}])
    assert bare.convert_ids_to_tokens(ids) == ["a", "b", "c"]


def test_unfinished_run_without_checkpoint(run_folder, capsys):
    shutil.rmtree(run_folder / "adapter")
    with pytest.raises(UserError) as error:
        generate.run([str(run_folder)])
    assert str(error.value) == (
        f"{run_folder} has neither an adapter nor a complete checkpoint yet\n"
        "hint: give the run's command again to go on with it"
    )


def test_no_such_run(run_folder):
    missing = run_folder.parent / "rum"
    with pytest.raises(UserError) as error:
        generate.run([str(missing)])
    assert (
        str(error.value) == f"run directory {missing} does not exist\nhint: runs here: {run_folder}"
    )


def test_row_without_a_prompt(run_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(UserError) as error:
        generate.run([str(run_folder), "--input", str(file)])
    assert str(error.value) == (
        f"{file}:2: found the keys question\nhint: a row has prompt, input or messages"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a run directory, or --model with --adapter"),
        (["r", "--prompt", "a", "--input", "b"], "give --prompt or --input, not both"),
        (["r", "--top-p", "0"], "0 is not above 0 and at most 1"),
        (["r", "--input", "f", "--temperature", "1"], "answers in batches, greedily"),
    ],
)
def test_wrong_words_are_refused_before_torch(words, message):
    """As a process: torch must not have been imported by then."""
    code = (
        "import sys\nfrom lora_train.commands import generate\n"
        "try: generate.run(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == "False\n"
