"""`lora-train eval` on a tiny trained run: its figures, its files, and how it goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_train import cli
from lora_train.errors import RunError, UserError
from lora_train.evaluation import measuring


def metrics(run_folder):
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "val_loss" in row]


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_the_loss_is_that_of_the_runs_validation(run_folder, evaluated):
    *_, last = metrics(run_folder)
    summary = evaluated(run_folder, "--which", "both")
    figures = summary["results"]["adapter"]
    assert figures["num_tokens"] == last["val_tokens"]
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(last["val_perplexity"], rel=1e-6)
    low, high = figures["intervals"]["loss"]
    assert low < figures["loss"] < high
    assert summary["num_rows"] == 12 and summary["num_in_training"] is not None
    # it has learned something, and the base has not
    assert figures["exact_match"] > 0.5 > summary["results"]["base"]["exact_match"] == 0.0
    assert summary["difference"]["exact_match"] == figures["exact_match"]
    gained = summary["difference"]["mcnemar"]["gained"]
    assert gained == round(12 * figures["exact_match"])
    assert summary["difference"]["loss"] == pytest.approx(
        figures["loss"] - summary["results"]["base"]["loss"]
    )
    assert summary["difference"]["intervals"]["loss"][1] < 0
    assert json.loads((run_folder / "eval_validation_both.json").read_text()) == summary


def test_the_base_is_the_untrained_model_and_a_checkpoint_its_step(run_folder, evaluated):
    base = evaluated(run_folder, "--which", "base", "--loss-only")
    assert base["results"]["base"]["loss"] == pytest.approx(
        metrics(run_folder)[0]["val_loss"], rel=1e-6
    )
    assert base["max_new_tokens"] is None and base["results"]["base"]["num_answered"] == 0
    early = evaluated(run_folder, "--checkpoint", 8, "--loss-only")
    last = evaluated(run_folder, "--loss-only")
    assert last["results"]["adapter"]["loss"] < early["results"]["adapter"]["loss"]
    assert (early["step"], last["step"]) == (8, None)
    assert (run_folder / "eval_validation_step8_loss.json").exists()
    # a run that is not finished: the next step's figures stand beside these
    shutil.rmtree(run_folder / "adapter")
    assert evaluated(run_folder, "--loss-only")["name"] == "validation_step16_loss"


@pytest.mark.parametrize(
    "changes",
    [
        ["model.quantization=nf4"],
        ["peft.init=pissa"],
        ["data.packed_sequence=false", "data.train_on=all", "data.path=TRAIN"],
    ],
)
def test_the_loss_of_other_runs_is_that_of_their_validation(
    changes, train_other, assets, evaluated
):
    """A quantized base, one that the adapter's start changed; rows held out, without packs."""
    file = str(assets / "data" / "train.jsonl")
    run_folder = train_other(
        "trainer.max_steps=2", "trainer.val_check_interval=2", "data.validation_size=0.2",
        *(change.replace("TRAIN", file) for change in changes),
    )  # fmt: skip
    first, last = metrics(run_folder)
    results = evaluated(run_folder, "--which", "both", "--loss-only")["results"]
    assert results["adapter"]["num_tokens"] == last["val_tokens"]
    assert results["adapter"]["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert results["base"]["loss"] == pytest.approx(first["val_loss"], rel=1e-6)
    assert first["val_loss"] - last["val_loss"] > 1e-3


def test_losses_and_answers_are_those_of_plain_transformers(run_folder, evaluated, assets):
    summary = evaluated(run_folder)
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    base = AutoModelForCausalLM.from_pretrained(assets / "model")
    model = PeftModel.from_pretrained(base, run_folder / "adapter")
    for row in lines(summary["rows_file"]):
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        answer = tokenizer(row["references"][0], return_tensors="pt").input_ids
        end = torch.tensor([[tokenizer.eos_token_id]])
        whole = torch.cat([prompt, answer, end], dim=1)
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        with torch.no_grad():
            loss = model(whole, labels=labels).loss.item()
        assert row["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
        assert row["tokens"] == answer.shape[1] + 1
        out = model.generate(prompt, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["answer"] == text
        assert row["is_complete"] == (tokenizer.eos_token_id in out[0, prompt.shape[1] :])
        assert row["exact_match"] == (text.strip() == row["references"][0].strip())


def test_the_batch_size_changes_nothing(run_folder, evaluated, more_rows, tmp_path):
    found = []
    for size in (1, 3, 10):
        output = tmp_path / f"rows{size}.jsonl"
        evaluated(
            run_folder, "--data", more_rows, "--which", "both", "--batch-size", size,
            "--output", output,
        )  # fmt: skip
        found.append(output.read_text())
    assert found[0] == found[1] == found[2]
    assert [list(row) for row in lines(output)] == [
        ["place", "prompt", "references", "in_training", "adapter", "base"]
    ] * 10


def test_an_adapter_of_zeros_is_the_base(run_folder, evaluated):
    file = run_folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(
        {key: each.zero_() if "lora_B" in key else each for key, each in weights.items()}, file
    )
    summary = evaluated(run_folder, "--which", "both")
    adapter, base = (summary["results"][name] for name in ("adapter", "base"))
    assert adapter == base
    difference = summary["difference"]
    assert difference["loss"] == difference["exact_match"] == 0.0
    assert difference["mcnemar"] == {"gained": 0, "lost": 0, "p_value": 1.0}
    assert difference["intervals"]["loss"] is None
    for row in lines(summary["rows_file"]):
        assert row["adapter"] == row["base"]


def test_a_merged_model_is_measured_alike(run_folder, evaluated, assets, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(assets / "model")
    merged = PeftModel.from_pretrained(base, run_folder / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(assets / "model").save_pretrained(tmp_path / "merged")
    whole = evaluated(run_folder, "--merged", tmp_path / "merged")["results"]["model"]
    adapter = evaluated(run_folder)["results"]["adapter"]
    assert whole["loss"] == pytest.approx(adapter["loss"], rel=1e-4)
    assert whole["exact_match"] == adapter["exact_match"]
    assert (run_folder / "eval_validation_merged.json").exists()
    # the rows by name, without the run: another packing, the same rows
    output = tmp_path / "alone.jsonl"
    alone = evaluated(
        "--model", tmp_path / "merged", "--data", assets / "data" / "validation.jsonl",
        "--output", output, "--max-new-tokens", 6,
    )  # fmt: skip
    # bf16 where the CPU has it: the run asked for fp32
    assert alone["results"]["model"]["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert alone["num_in_training"] is None and output.with_suffix(".json").exists()


def test_rows_in_the_training_data_are_said(run_folder, more_rows, capsys, evaluated):
    assert cli.main(["eval", str(run_folder), "--data", str(more_rows)]) == 0
    out = capsys.readouterr().out
    assert "warning: 2 of 10 rows are in the training data" in out
    summary = evaluated(run_folder, "--data", more_rows)
    assert summary["num_in_training"] == 2
    others = summary["without_training_rows"]["adapter"]
    assert others["num_answered"] == 8
    marked = [row["in_training"] for row in lines(summary["rows_file"])]
    assert marked == [True] * 2 + [False] * 8


def test_what_is_printed(run_folder, capsys):
    words = ["eval", str(run_folder), "--which", "both", "--max-new-tokens", "2"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    for said in (
        "base", "adapter", "difference", "exact match", "F1 (SQuAD)", "McNemar",
        "answers (adapter) were cut at 2 tokens", "answers furthest off", "expected",
        str(run_folder / "eval_validation_both.jsonl"),
    ):  # fmt: skip
        assert said in captured.out
    assert "all 12 rows" in captured.err and "answers: 24 of 24" in captured.err
    # the same words again measure nothing
    assert cli.main(words) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert "this was evaluated before" in again.err and "answers:" not in again.err


def test_names_are_no_markup(run_folder, more_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "[/a] b"
    folder.mkdir(parents=True)
    file = Path(shutil.copy(more_rows, folder / "[x].jsonl"))
    words = ["--data", str(file), "--max-new-tokens", "1", "--output", str(tmp_path / "o.jsonl")]
    assert cli.main(["eval", str(run_folder), *words]) == 0
    assert f"row       {file}:" in capsys.readouterr().out


def test_references_in_json(run_folder, tmp_path, evaluated):
    rows = [{"prompt": "a", "completion": '{"x": 1}'}, {"prompt": "b", "completion": "[]"}]
    file = tmp_path / "json.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = evaluated(run_folder, "--data", file)["results"]["adapter"]
    assert figures["json_valid"] == figures["field_f1"] == 0.0


def test_batches_shrink_where_memory_ends(run_folder, evaluated, more_rows, monkeypatch, tmp_path):
    real, sizes = measuring.answer_prompts, []

    def answer(*arguments, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("too much")
        return real(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(measuring, "answer_prompts", answer)
    words = [run_folder, "--data", more_rows, "--batch-size", 10]
    evaluated(*words, "--output", tmp_path / "small.jsonl")
    assert sizes == [10, 5, 2]
    monkeypatch.setattr(measuring, "answer_prompts", real)
    evaluated(*words, "--output", tmp_path / "large.jsonl")
    assert (tmp_path / "small.jsonl").read_text() == (tmp_path / "large.jsonl").read_text()

    def never(*arguments, **options):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(measuring, "answer_prompts", never)
    with pytest.raises(RunError, match="with a single prompt"):
        evaluated(*words, "--output", tmp_path / "none.jsonl")


def test_micro_batches_shrink_where_memory_ends(run_folder, evaluated, monkeypatch):
    real, tokens = measuring.token_losses, []

    def losses(model, batch):
        tokens.append(batch.input_ids.numel())
        if batch.input_ids.numel() > 64:
            raise torch.OutOfMemoryError("too much")
        return real(model, batch)

    monkeypatch.setattr(measuring, "token_losses", losses)
    small = evaluated(run_folder, "--loss-only")["results"]["adapter"]["loss"]
    assert max(tokens) > 64
    assert small == pytest.approx(metrics(run_folder)[-1]["val_loss"], rel=1e-6)


def test_weights_that_are_not_numbers(run_folder, evaluated):
    file = run_folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key: torch.full_like(each, float("nan")) for key, each in weights.items()}, file)
    with pytest.raises(RunError, match="not finite"):
        evaluated(run_folder)


def test_an_adapter_that_is_cut_off(run_folder, evaluated):
    file = run_folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be put on .*incomplete"):
        evaluated(run_folder)
    assert not list(run_folder.glob("eval_*"))


def test_a_loss_that_is_no_number(run_folder, evaluated, monkeypatch):
    def losses(model, batch):
        return torch.full_like(batch.predicting, float("nan"), dtype=torch.float32)

    monkeypatch.setattr(measuring, "token_losses", losses)
    with pytest.raises(RunError, match=r"validation\.jsonl:\d+: the loss is not finite"):
        evaluated(run_folder)


def test_what_does_not_exist(run_folder, evaluated, more_rows, tmp_path):
    with pytest.raises(UserError) as error:
        evaluated(run_folder, "--checkpoint", 13)
    assert error.value.message.endswith("there is none")
    assert "checkpoints kept: 8, 16" in str(error.value.hint)
    with pytest.raises(UserError, match="the folder .* for the results does not exist"):
        evaluated(run_folder, "--output", tmp_path / "no" / "rows.jsonl")
    shutil.rmtree(run_folder / "adapter")
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(UserError, match="neither an adapter nor a complete checkpoint"):
        evaluated(run_folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a run directory (or --model PATH with --data)"),
        (["--model", "m"], "without a run directory, --data FILE names the rows"),
        (["r", "--output", "rows.json"], "--output rows.json: a line for each row is written"),
        (["r", "--tasks", ","], "name at least one"),
        (["r", "--merged", "d", "--which", "both"], "--which is for the run's adapter and base"),
        (["r", "--merged", "d", "--checkpoint", "3"], "--checkpoint is for the run's adapter"),
        (["r", "--num-fewshot", "3"], "--num-fewshot: only with --tasks"),
        (["r", "--tasks", "a", "--data", "f"], "--data: not with --tasks"),
        (["r", "--subset", "s"], "--subset is of a hub dataset: name it with --data"),
        (["r", "--limit", "0"], "0 is not a whole number, 1 or more"),
        (["RUN", "--data", "BAD"], "bad.jsonl:2:1: no key 'completion'"),
        (["RUN", "--checkpoint", "7"], "checkpoints kept: 8, 16"),
    ],
)
def test_mistakes_are_refused_before_torch(words, message, trained, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    words = [{"RUN": str(trained), "BAD": str(bad)}.get(word, word) for word in words]
    code = (
        "import sys\nfrom lora_train import cli\n"
        "try: sys.exit(cli.main(['eval', *sys.argv[1:]]))\n"
        "finally: print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == "False\n"
