"""The door to lm-evaluation-harness, with a task on a local file; skipped where it is missing."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from lora_train.commands import evaluate
from lora_train.errors import UserError
from lora_train.evaluation import harness

TASK = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"word": f"{'dcb' * n}{end}", "label": "abcd".index(end) // 2} for n, end in
            [(1, "a"), (2, "b"), (1, "c"), (2, "d"), (3, "c"), (3, "d")]]  # fmt: skip
    file = folder / "endings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "endings.yaml").write_text(TASK.format(file=file))
    return folder


def test_without_the_package(trained, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    with pytest.raises(UserError, match="which is not installed") as error:
        evaluate.run([str(trained), "--tasks", "hellaswag"])
    assert "-m pip install 'lm_eval>=" in str(error.value.hint)
    assert "lm_eval --model dummy --limit 1 --tasks hellaswag" in str(error.value.hint)

    # in an image, which is read-only
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError) as error:
        harness.check_installed(["hellaswag"])
    hint = str(error.value.hint)
    python = hint.split(": ", 1)[1].split(" -m venv DIR && echo ")[0]
    assert Path(python).is_file()
    assert "DIR/bin/pip install 'lm_eval>=" in hint and "-m lora_train eval" in hint


@pytest.mark.slow
@needs_harness
def test_answers_end_where_the_model_says(run_folder, tasks, assets, evaluated):
    """At an end of turn that generation_config.json alone names, as of some chat models."""
    task = (tasks / "endings.yaml").read_text()
    begin, end = task.index("output_type"), task.index("metric_list")
    generated = (
        'output_type: generate_until\ndoc_to_text: "{{word}}"\n'
        "doc_to_target: \"{{'no' if label else 'yes'}}\"\n"
        "generation_kwargs: {until: [X], max_gen_toks: 6}\n"
    )
    metric = task[end:].replace("acc", "exact_match")
    (tasks / "endings.yaml").write_text(task[:begin] + generated + metric)
    model = shutil.copytree(assets / "model", tasks / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    letter = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["n"]
    settings["eos_token_id"] = [settings["eos_token_id"], letter]
    (model / "generation_config.json").write_text(json.dumps(settings))
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace(str(assets / "model"), str(model)))
    summary = evaluated(run_folder, "--tasks", "endings", "--include-path", tasks)
    # every `yes`; of the four `no` only the n is written
    [metrics] = summary["tasks"]["adapter"]["results"].values()
    assert metrics["exact_match,none"] == pytest.approx(2 / 6)


@pytest.mark.slow
@needs_harness
def test_a_task_of_ones_own(run_folder, tasks, evaluated):
    summary = evaluated(
        run_folder, "--tasks", "endings", "--include-path", tasks, "--which", "both"
    )
    found = {name: each["results"]["endings"] for name, each in summary["tasks"].items()}
    # the trained model tells the endings, the random one says the same to all
    assert found["adapter"]["acc,none"] == 1.0
    assert found["base"]["acc,none"] < 1.0
    assert summary["tasks"]["adapter"]["n-samples"]["endings"]["effective"] == 6
    written = json.loads((run_folder / "eval_tasks-endings_both.json").read_text())
    assert written == summary


@pytest.mark.slow
@needs_harness
def test_the_table(run_folder, tasks, capsys):
    words = ["--tasks", "endings", "--include-path", str(tasks), "--limit", "2"]
    assert evaluate.run([str(run_folder), *words]) == 0
    out = capsys.readouterr().out
    assert "endings" in out and "acc" in out and "1.0000" in out
    assert (run_folder / "eval_tasks-endings_first2.json").exists()


@pytest.mark.slow
@needs_harness
def test_unknown_tasks(run_folder, tasks):
    with pytest.raises(UserError, match="has no helaswag") as error:
        evaluate.run([str(run_folder), "--tasks", "helaswag"])
    assert "hellaswag" in str(error.value.hint)
    with pytest.raises(UserError, match="is no folder"):
        evaluate.run([str(run_folder), "--tasks", "a", "--include-path", str(tasks / "no")])


@pytest.mark.slow
@needs_harness
def test_a_base_model_has_no_turns(run_folder, tasks):
    words = ["--tasks", "endings", "--include-path", str(tasks), "--apply-chat-template"]
    with pytest.raises(UserError, match="no chat template"):
        evaluate.run([str(run_folder), *words])


@pytest.mark.slow
@needs_harness
def test_data_that_is_not_there(run_folder, tasks, monkeypatch):
    (tasks / "endings.jsonl").unlink()
    with pytest.raises(UserError, match="the data of endings cannot be loaded"):
        evaluate.run([str(run_folder), "--tasks", "endings", "--include-path", str(tasks)])
