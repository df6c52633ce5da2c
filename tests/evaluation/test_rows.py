"""Which rows are read, with which references, and what is refused; and which are in training."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from lora_train.config import Config, DataConfig, ModelConfig
from lora_train.errors import UserError
from lora_train.evaluation.overlap import rows_in_training
from lora_train.evaluation.rows import read_questions, render_rows

SQUAD = {
    "id": "1",
    "title": "Delaware",
    "context": "Dover is in Delaware.",
    "question": "Where is Dover?",
    "answers": {"text": ["Delaware", "in Delaware"], "answer_start": [12, 9]},
}
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def write(tmp_path):
    def to(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return to


@pytest.fixture
def config(assets):
    return Config(
        model=ModelConfig(path=str(assets / "model")), data=DataConfig(path=str(assets / "data"))
    )


@pytest.fixture
def tokenizer(assets):
    return AutoTokenizer.from_pretrained(assets / "model")


def read(config, data=None, *, split=None, limit=None, with_answers=True):
    return read_questions(config, data=data, split=split, limit=limit, with_answers=with_answers)


def rendered(questions, config, tokenizer, **data):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    return render_rows(questions, config, tokenizer, max_positions=256)


def refusal(config, data, **options):
    with pytest.raises(UserError) as error:
        read(config, data, **options)
    return str(error.value)


def test_by_default_what_the_run_validates_on(config, assets):
    questions = read(config)
    assert questions.is_held_out and len(questions.references) == 12
    assert str(assets / "data" / "validation.jsonl") in questions.describe()
    assert questions.describe().startswith("all 12 rows of ")


def test_a_run_whose_data_is_gone(config, tmp_path):
    gone = dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "gone.jsonl")))
    said = refusal(gone, None)
    assert "the rows that the run validates on are not here" in said
    assert "gone.jsonl does not exist" in said and "hint: --data FILE" in said


def test_a_run_that_held_nothing_out(config, assets):
    data = DataConfig(path=str(assets / "data" / "train.jsonl"), validation_size=0.0)
    assert "hint: --data FILE" in refusal(dataclasses.replace(config, data=data), None)


def test_the_first_rows(config):
    questions = read(config, limit=5)
    assert "the first 5 of 12 rows" in questions.describe()
    assert questions.references == read(config).references[:5]
    assert read(config, limit=50).describe().startswith("all 12 rows")


def test_rows_of_nemo_and_of_squad_are_the_same(config, write, tokenizer):
    nemo = {
        "input": "Context: Dover is in Delaware. Question: Where is Dover? Answer:",
        "output": "Delaware",
        "original_answers": ["Delaware", "in Delaware"],
    }
    both = [read(config, write(f"{len(row)}.jsonl", row)) for row in (nemo, SQUAD)]
    assert [each.references for each in both] == [[("Delaware", "in Delaware")]] * 2
    rows = [rendered(each, config, tokenizer) for each in both]
    assert rows[0].fingerprint() == rows[1].fingerprint()
    [row] = rows[0].rows
    assert tokenizer.decode(row.prompt_ids) == nemo["input"]
    tokens, supervised = rows[0].sequences[0]
    assert tokenizer.decode(tokens[supervised]) == " Delaware<|endoftext|>"


def test_squad_in_other_files(config, tmp_path):
    import datasets

    file = tmp_path / "squad.parquet"
    datasets.Dataset.from_list([SQUAD] * 3).to_parquet(str(file))
    assert read(config, str(file)).references == [("Delaware", "in Delaware")] * 3


def test_rows_of_a_known_form_may_have_squads_columns(config, write):
    row = {**SQUAD, "prompt": "Where?", "completion": "in the north"}
    assert read(config, write("both.jsonl", row)).references == [("in the north",)]


def test_bad_rows_are_named_with_their_line(config, write):
    without = {key: value for key, value in SQUAD.items() if key != "answers"}
    file = write(
        "rows.jsonl", without, {**SQUAD, "answers": {"text": []}}, {**SQUAD, "question": 7}, SQUAD
    )
    said = refusal(config, file)
    assert "3 of 4 rows" in said and f"{file}:1:" in said and 'answers like {"text": [...]}' in said
    assert f"{file}:2:" in said and "a question without one cannot be scored" in said
    assert f"{file}:3:" in said and "question: expected text; found the number 7" in said

    row = {"input": "a", "output": "b"}
    file = write(
        "nemo.jsonl", row, {**row, "original_answers": []}, {**row, "original_answers": ["x", " "]},
        {**row, "original_answers": "x"},
    )  # fmt: skip
    said = refusal(config, file)
    assert "3 of 4 rows" in said
    for line in (2, 3, 4):
        assert f"{file}:{line}:" in said
    assert "original_answers[1]: empty answer" in said

    file = write("empty.jsonl", {"prompt": "a", "completion": "  "})
    assert "empty completion" in refusal(config, file)


def test_an_answer_without_text_has_only_a_loss(config, write):
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    file = write("tools.jsonl", {"messages": turns})
    assert "calls a tool and has no text" in refusal(config, file)
    assert read(config, file, with_answers=False).references == [()]


def test_plain_text_has_no_answers(config, write, tokenizer):
    questions = read(config, write("text.jsonl", {"text": "hello"}, {"text": "there"}))
    assert not questions.are_answered
    rows = rendered(questions, config, tokenizer)
    assert [row.prompt_ids for row in rows.rows] == [None, None]
    assert [len(row.sequences) for row in rows.rows] == [1, 1]


def test_the_split_that_is_taken(config, tmp_path, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    row = {"prompt": "a", "completion": "b"}
    for name, count in (("train", 3), ("validation", 2), ("test", 1)):
        write(f"folder/{name}.jsonl", *[row] * count)
    assert len(read(config, str(folder)).references) == 1
    assert len(read(config, str(folder), split="validation").references) == 2
    assert len(read(config, split="train").references) == 96  # of the run's own data
    assert "--split: " in refusal(config, str(folder), split="tset")
    assert "hint: --split=test" in refusal(config, str(folder), split="tset")


def test_a_missing_file_is_said_in_the_words_of_the_command(config, write, tmp_path):
    write("test.jsonl", SQUAD)
    said = refusal(config, str(tmp_path / "tset.jsonl"))
    assert said.startswith("--data: ") and "did you mean" in said
    assert "data.path" not in said


def test_a_hub_dataset_that_is_not_here(config, monkeypatch, tmp_path):
    import datasets

    def no_network(*arguments, **options):
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refusal(config, "nobody/nothing")
    assert said.startswith("--data: nobody/nothing is no file or folder here")
    assert said.endswith("HF_HUB_OFFLINE=0 hf download --repo-type dataset nobody/nothing")


def test_rows_that_are_too_long_are_counted(config, write, tokenizer):
    rows = [{"prompt": "a" * length, "completion": "b"} for length in (5, 60, 61, 200)]
    questions = read(config, write("rows.jsonl", *rows))
    found = rendered(questions, config, tokenizer, seq_length=62)
    # with the answer and the end of text: 7, 62, 63 and 202 tokens
    assert [len(row.sequences) for row in found.rows] == [1, 1, 0, 0]
    assert found.num_too_long == 2
    # asked where the prompt fits, as in the run's own answers
    assert [row.prompt_ids is None for row in found.rows] == [False, False, False, True]

    cut = rendered(questions, config, tokenizer, seq_length=62, overlong="truncate")
    assert (cut.num_too_long, cut.num_cut) == (0, 2)
    assert [len(row.prompt_ids) for row in cut.rows] == [5, 60, 60, 60]

    with pytest.raises(UserError, match="no row fits data.seq_length=8") as error:
        rendered(read(config, write("long.jsonl", *rows[1:])), config, tokenizer, seq_length=8)
    assert error.value.hint == "--seq-length 256"


def test_rows_in_the_training_data(config, assets, write, tokenizer):
    known = json.loads((assets / "data" / "train.jsonl").read_text().splitlines()[7])
    rows = [
        known,
        {**known, "completion": " another answer"},
        {**known, "prompt": known["prompt"] + "x"},
    ]
    questions = read(config, write("rows.jsonl", *rows))
    assert rows_in_training(questions.examples.items, config, tokenizer) == [True, True, False]


def test_turns_of_a_training_chat_are_in_the_training_data(config, write, tokenizer):
    tokenizer.chat_template = CHATML

    def chat(*turns):
        roles = ("user", "assistant") * len(turns)
        return {
            "messages": [
                {"role": role, "content": text} for role, text in zip(roles, turns, strict=False)
            ]
        }

    training = write("train.jsonl", chat("a", "b", "c", "d"), chat("e", "f"))
    config = dataclasses.replace(config, data=DataConfig(path=training, validation_size=0.0))
    rows = [chat("a", "other"), chat("a", "b", "c", "other"), chat("c", "d"), chat("e", "f")]
    questions = read(config, write("rows.jsonl", *rows))
    found = rows_in_training(questions.examples.items, config, tokenizer)
    assert found == [True, True, False, True]


def test_training_data_that_is_gone(config, write, tokenizer, tmp_path, caplog):
    questions = read(config, write("rows.jsonl", {"prompt": "a", "completion": "b"}))
    gone = dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "gone.jsonl")))
    assert rows_in_training(questions.examples.items, gone, tokenizer) is None
