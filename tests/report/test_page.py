"""The page and the terminal's version: whole in themselves, and right about several runs."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_train.cli import main
from lora_train.report.findings import find_all
from lora_train.report.page import render
from lora_train.report.plots import make_plots
from lora_train.report.terminal import draw_text, print_report

Make = Callable[..., Any]
SAMPLE = {
    "prompt": "<script>alert(1)</script>", "before": "a & b", "after": "<img src=x>",
    "reference": "\N{GREEK SMALL LETTER ALPHA}", "after_is_exact": False,
}  # fmt: skip


def test_what_models_and_users_say_is_text(sample_run: Make) -> None:
    run = sample_run("a<b", "data.path=<i>.jsonl")
    run.write("summary.json", {"steps": 120, "samples": [SAMPLE]})
    page = render([find_all(run.folder)])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;img src=x&gt;" in page
    assert "a&lt;b" in page and "&lt;i&gt;.jsonl" in page
    assert not re.search(r"<(script|img|i|b)\b", page)


@pytest.fixture(scope="module")
def page(sample_run: Make) -> str:
    """Of a run with all there is."""
    run = sample_run("whole")
    run.add_gpu_log()
    return render([find_all(run.folder)])


def test_the_page_needs_nothing_else(page: str) -> None:
    # names of XML's vocabularies are no addresses
    named = page.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert "http:" not in named and "https:" not in named and "//" not in named
    assert "default-src 'none'" in page
    assert {href[:1] for href in re.findall(r'(?:src|href)="([^"]*)"', page)} <= {"#"}
    assert "url(" not in page.replace("url(#", "")


def test_the_drawings_take_their_colours_from_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 5 + 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "#0000" not in drawing and "var(--series-0)" in drawing
    # each has names of its own
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    # the validation at step 20, when it is pointed at
    assert re.search(r"<title>step 20\nvalidation: 1\.08 nats per token</title>", page)


def test_several_runs_side_by_side(
    sample_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = sample_run("one"), sample_run("two", "peft.dim=32", "optim.lr=1e-3", seed=1)
    arguments = [str(one.folder), str(two.folder), "--output", str(tmp_path / "out")]
    assert main(["report", *arguments]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 runs side by side" in page
    rows = re.findall(r"<tr><th><code>(.*?)</code></th><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert ("peft.dim", "8", "32") in rows
    assert {row[0] for row in rows} == {"peft.dim", "optim.lr"}
    assert "settings that differ" in capsys.readouterr().out
    assert (tmp_path / "out" / "plots" / "val_loss.png").is_file()
    assert not (one.folder / "report.html").exists()


def test_runs_of_one_name_are_told_apart(sample_run: Make, tmp_path: Path) -> None:
    one, two = sample_run("runs/a/mine"), sample_run("runs/b/mine")
    page = render([find_all(one.folder), find_all(two.folder)])
    assert str(one.folder) in page and str(two.folder) in page
    assert "<p>None.</p>" in page  # settings that differ


def test_several_runs_of_which_one_did_nothing(sample_run: Make) -> None:
    one, two = sample_run("one"), sample_run("two")
    for file in two.folder.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    page = render([find_all(one.folder), find_all(two.folder)])
    assert "No end was recorded: 0 of 120 steps" in page


def printed(folder: Path, encoding: str) -> str:
    """What a terminal of this encoding shows."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    print_report([find_all(folder)], stream)
    stream.flush()
    return buffer.getvalue().decode(encoding)


def test_the_terminal(sample_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = sample_run()
    text = printed(run.folder, "utf-8")
    assert "mine: Complete: 120 steps" in text
    assert re.search(r"^goodput +23\.7 %$", text, re.MULTILINE)
    assert re.search("[\u2801-\u28ff]", text) and "\N{FULL BLOCK}" in text
    assert max(map(len, text.splitlines())) <= 80
    plain = printed(run.folder, "ascii")
    assert plain.isascii() and "***" in plain and "####" in plain
    monkeypatch.setenv("COLUMNS", "58")
    narrow = printed(run.folder, "utf-8").splitlines()
    assert any(line.startswith("waiting") and line.endswith("\N{FULL BLOCK}") for line in narrow)
    assert max(map(len, narrow)) <= 58 and not any(
        set(line) == {"\N{FULL BLOCK}"} for line in narrow
    )


def evaluation(exact_match: float) -> dict[str, Any]:
    """What `lora-train eval` writes, in short."""
    adapter = {
        "num_measured": 200, "num_tokens": 9000, "loss": 0.1234, "num_answered": 200,
        "exact_match": exact_match, "f1": 0.5, "field_f1": 0.91,
        "perplexity": math.inf,
        "intervals": {"loss": [0.11, 0.14], "exact_match": [0.68, 0.79], "field_f1": None},
    }  # fmt: skip
    base = {"num_measured": 200, "num_answered": 0, "loss": 0.9, "intervals": {"loss": None}}
    difference = {"loss": -0.7766, "exact_match": 0.4, "intervals": {"loss": [-0.8, -0.7]}}
    return {
        "subject": "runs/<mine>", "rows": "validation", "num_rows": 201, "num_too_long": 1,
        "num_in_training": 7, "results": {"adapter": adapter, "base": base},
        "difference": difference,
    }  # fmt: skip


def test_evaluations_of_a_run(sample_run: Make) -> None:
    run = sample_run()
    run.write("eval_validation_both.json", evaluation(0.74))
    (run.folder / "eval_cut.json").write_text('{"results": {')
    page = render([find_all(run.folder)])
    table = page[page.index("<h2>Evaluations") : page.index("<h2>What it was made with")]
    lines = re.findall(r"<tr><th>([^<]*)</th><td[^>]*>(.*?)</td>(.*?)</tr>", table, re.DOTALL)
    assert [line[:2] for line in lines] == [
        ("base", "200"),
        ("adapter", "200"),
        ("difference", ""),
    ]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line[2]) for line in lines]
    assert cells[0] == ["0.9000", "-", "-"]
    assert cells[1] == [
        "0.1234<small>0.1100 to 0.1400</small>", "74.0 %<small>68.0 % to 79.0 %</small>", "91.0 %",
    ]  # fmt: skip
    assert cells[2][0] == "-0.7766<small>-0.8000 to -0.7000</small>" and cells[2][1] == "+40.0 %"
    assert "7 of 201 rows are in the training data" in table and "runs/&lt;mine&gt;" in table
    assert "eval_cut" not in page


def test_evaluations_side_by_side(sample_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = sample_run("one"), sample_run("two")
    one.write("eval_test.json", evaluation(0.74))
    two.write("eval_test.json", evaluation(0.5))
    page = render([find_all(run.folder) for run in (one, two)])
    row = re.search(r"<tr><th>eval test: exact match</th>(.*?)</tr>", page)
    assert row is not None and re.findall(r">(\d[^<]*)<", row[1]) == ["74.0 %", "50.0 %"]
    assert main(["report", str(one.folder), str(two.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    adapter = found[1]["evaluations"]["test"]["results"]["adapter"]
    assert adapter["exact_match"] == 0.5 and adapter["perplexity"] is None
    print_report([find_all(one.folder)])
    assert re.search("eval test: exact match +74.0 %", capsys.readouterr().out)


def test_small_plots_show_where_the_points_are(sample_run: Make) -> None:
    (loss, *_) = make_plots([find_all(sample_run().folder)])
    lines = draw_text(loss, is_utf8=False, columns=30, rows=5)
    bodies = [line.partition("|")[2] for line in lines[:-1]]
    assert len(bodies) == 5
    # it falls: above at the left, below at the right, and nowhere else
    assert bodies[0].startswith("*") and bodies[0].rstrip("* ") == ""
    assert bodies[4].rstrip().endswith("*") and bodies[4][:8].strip() == ""
    assert lines[0].startswith("1.62") or lines[0].strip().startswith("1.62")
    assert lines[-1].endswith("step 120")
