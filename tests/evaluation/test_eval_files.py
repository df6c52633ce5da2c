"""`lora-train eval` on disk: how it goes on after its end, and what it writes where."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_train import cli
from lora_train.errors import UserError
from lora_train.evaluation import measuring


def test_a_stop_and_a_torn_line_change_nothing(
    run_folder, more_rows, evaluated, tmp_path, monkeypatch, capsys
):
    """As a job's end does it: SIGTERM in the middle of the answers."""
    words = [run_folder, "--data", more_rows, "--which", "both", "--batch-size", 3]
    whole = tmp_path / "whole.jsonl"
    evaluated(*words, "--output", whole)
    output = tmp_path / "rows.jsonl"
    asked = []

    def stopped(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    real = measuring.answer_prompts
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(measuring, "answer_prompts", stopped)
    try:
        assert cli.main(["eval", *map(str, words), "--output", str(output)]) == 75
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "20 losses and 9 answers are kept" in capsys.readouterr().err
    assert not output.exists()
    with (tmp_path / "rows.jsonl.part").open("a") as file:
        file.write('{"of": "base", "row": 1, "ans')

    asked.clear()
    asked.append("not stopped again")
    monkeypatch.setattr(measuring, "token_losses", None)  # losses are not measured again
    asked += [None] * 10
    evaluated(*words, "--output", output)
    assert output.read_bytes() == whole.read_bytes()
    # 4 batches as 2 variants, of which 3 were answered
    assert len(asked) == 11 + 5
    assert sorted(path.name for path in tmp_path.glob("*rows.jsonl*")) == ["rows.jsonl"]


def test_another_question_does_not_go_on(run_folder, evaluated, monkeypatch, capsys):
    def never(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "answer_prompts", never)
        assert cli.main(["eval", str(run_folder), "--max-new-tokens", "3"]) == 75
    part = run_folder / "eval_validation.jsonl.part"
    assert part.exists()
    assert cli.main(["eval", str(run_folder), "--max-new-tokens", "4"]) == 0
    err = capsys.readouterr().err
    assert "was of another max_new_tokens" in err
    assert not part.exists() and part.with_name(f"{part.name}.old").exists()


@pytest.mark.slow
def test_a_kill_loses_one_batch(run_folder, more_rows, evaluated, tmp_path):
    words = [str(run_folder), "--data", str(more_rows), "--batch-size", "2"]
    output = tmp_path / "rows.jsonl"
    code = (
        "import os, signal, sys\nfrom lora_train import cli\n"
        "from lora_train.evaluation import journal\n"
        "add = journal.Journal.add_answers\n"
        "def last(self, *a):\n    add(self, *a)\n"
        "    if len(self.answers) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.add_answers = last\n"
        "sys.exit(cli.main(['eval', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *words, "--output", str(output)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists()
    evaluated(*words, "--output", output)
    whole = tmp_path / "whole.jsonl"
    evaluated(*words, "--output", whole)
    assert output.read_bytes() == whole.read_bytes()


def test_two_at_once_are_refused(run_folder, evaluated):
    from lora_train.evaluation.journal import Journal

    journal = Journal(run_folder / "eval_validation.jsonl", {})
    with pytest.raises(UserError, match="another lora-train writes"):
        evaluated(run_folder)
    journal.close()


def test_no_other_file_is_replaced(run_folder, evaluated, more_rows, assets, tmp_path):
    before = more_rows.read_bytes()
    with pytest.raises(UserError, match="is there, and no evaluation wrote it"):
        evaluated(run_folder, "--output", more_rows)
    # the summary would lie beside the rows
    array = tmp_path / "rows.json"
    array.write_text("[]")
    with pytest.raises(UserError, match=r"it or rows\.json is there"):
        evaluated(
            "--model", assets / "model", "--data", more_rows,
            "--output", array.with_suffix(".jsonl"),
        )  # fmt: skip
    assert more_rows.read_bytes() == before and array.read_text() == "[]"


def test_another_evaluation_of_the_same_name_is_kept(run_folder, evaluated, more_rows, tmp_path):
    words = [run_folder, "--data", more_rows, "--loss-only"]
    evaluated(*words)
    files = [run_folder / f"eval_more_loss.json{end}" for end in ("", "l")]
    before = [file.read_bytes() for file in files]
    evaluated(*words, "--seq-length", 32)
    assert [file.read_bytes() for file in files] == before  # the same rows, the same figures
    more_rows.write_text(more_rows.read_text().replace("yes", "no"))
    evaluated(*words)
    assert files[0].read_bytes() != before[0]
    assert [file.with_name(f"{file.name}.old").read_bytes() for file in files] == before


def test_rows_that_another_evaluation_replaced_are_written_again(
    run_folder, evaluated, more_rows, tmp_path
):
    output = tmp_path / "rows.jsonl"
    words = [run_folder, "--loss-only", "--output", output]
    evaluated(*words)
    rows = output.read_bytes()
    evaluated(*words, "--data", more_rows)
    assert output.read_bytes() != rows
    evaluated(*words)
    assert output.read_bytes() == rows


def test_a_run_that_cannot_be_written(run_folder, tmp_path, evaluated, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != run_folder and real(path, mode)
    )
    with pytest.raises(UserError, match="cannot be written into") as error:
        evaluated(run_folder)
    assert error.value.hint == "--output FILE.jsonl in a folder of yours"
    evaluated(run_folder, "--output", tmp_path / "mine.jsonl", "--loss-only")
    assert json.loads((tmp_path / "mine.json").read_text())["num_rows"] == 12
    assert not list(run_folder.glob("eval_*"))
