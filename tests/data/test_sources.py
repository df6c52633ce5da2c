"""Reading: text arrives unchanged, splits are found, and what is missing is said."""

import json
import re

import datasets
import pytest

from lora_train.config import DataConfig
from lora_train.data import sources
from lora_train.data.examples import read_examples, read_sets
from lora_train.data.formats import InputOutput
from lora_train.data.sources import find_sources
from lora_train.errors import UserError

# each of these is something else after Arrow's or pandas' type inference
HARD_TEXTS = [
    "2020-01-01",
    "2020-01-01T00:00:00",
    "007",
    "1e5",
    "NA",
    "null",
    "True",
    " blank around ",
    "line\nfeed\r\nand\u2028separator",
    'quote " and \\ and \u00e9 \U0001f600',
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def pairs(texts=HARD_TEXTS):
    return [{"input": text, "output": text} for text in texts]


def write(tmp_path, ending):
    file = tmp_path / f"rows{ending}"
    rows = pairs()
    if ending == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".json":
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif ending == ".csv":
        lines = ["input,output"]
        for row in rows:
            quoted = row["input"].replace('"', '""')
            lines.append(f'"{quoted}","{quoted}"')
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def inputs(split, format_name="auto"):
    return [item.input for item in read_examples(split, format_name).items]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_text_arrives_unchanged(tmp_path, ending):
    file = write(tmp_path, ending)
    found = find_sources(DataConfig(path=str(file)), seed=0)
    assert inputs(found.train) == HARD_TEXTS
    assert found.validation is None and found.held_out_fraction == 0.05


def test_json_files_of_other_shapes(tmp_path):
    lines = "\ufeff" + "".join(json.dumps(row) + "\r\n\r\n" for row in pairs())
    wrapped = json.dumps({"version": 1, "data": pairs()}, indent=1)
    one = json.dumps(pairs()[0], indent=1)
    for name, text, number in (
        ("lines.json", lines, len(HARD_TEXTS)),
        ("wrapped.json", wrapped, len(HARD_TEXTS)),
        ("one.json", one, 1),
        ("array.jsonl", json.dumps(pairs()), len(HARD_TEXTS)),
    ):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8", newline="")
        assert inputs(find_sources(DataConfig(path=str(file)), 0).train) == HARD_TEXTS[:number]


def test_splits_of_folders(tmp_path, write_jsonl):
    nemo = [write_jsonl(pairs(["a", "b"]), f"nemo/{n}.jsonl") for n in ("training", "validation")]
    (tmp_path / "nemo" / "training.jsonl.idx.npy").write_bytes(b"index of NeMo")
    (tmp_path / "nemo" / "packed").mkdir()
    found = find_sources(DataConfig(path=str(tmp_path / "nemo")), 0)
    assert found.train.files == (nemo[0],) and found.validation.files == (nemo[1],)

    for split in ("train", "dev"):
        write_jsonl(pairs([split]), f"plain/{split}.jsonl")
    found = find_sources(DataConfig(path=str(tmp_path / "plain")), 0)
    assert inputs(found.train) == ["train"] and inputs(found.validation) == ["dev"]
    found = find_sources(DataConfig(path=str(tmp_path / "plain"), train_split="dev"), 0)
    assert inputs(found.train) == ["dev"]
    found = find_sources(DataConfig(path=str(tmp_path / "plain"), validation_path=str(nemo[1])), 0)
    assert found.validation.files == (nemo[1],)
    with pytest.raises(UserError) as caught:
        find_sources(DataConfig(path=str(tmp_path / "plain"), validation_split="tain"), 0)
    assert "no split 'tain'; it has dev, train" in caught.value.message
    assert caught.value.hint == "data.validation_split=train"


def test_a_snapshot_of_a_hub_dataset(tmp_path):
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        file = tmp_path / "snapshot" / "data" / f"{split}-0000{number}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(pairs([f"{split}{number}"])).to_parquet(file)
    (tmp_path / "snapshot" / "README.md").write_text("# a dataset\n")
    found = find_sources(DataConfig(path=str(tmp_path / "snapshot")), 0)
    assert inputs(found.train) == ["train0", "train1"]
    assert inputs(found.validation) == ["test0"]
    with pytest.raises(UserError, match="cannot read the folder .*BuilderConfig 'x' not found"):
        find_sources(DataConfig(path=str(tmp_path / "snapshot"), subset="x"), 0)


def test_json_in_a_snapshot_keeps_its_text(tmp_path, write_jsonl):
    write_jsonl(pairs(), "snapshot/data/train-00000.jsonl")
    found = find_sources(DataConfig(path=str(tmp_path / "snapshot")), 0)
    assert inputs(found.train) == HARD_TEXTS


def test_a_folder_made_by_save_to_disk(tmp_path):
    splits = {"train": datasets.Dataset.from_list(pairs(["a"]))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = find_sources(DataConfig(path=str(tmp_path / "saved")), 0)
    assert inputs(found.train) == ["a"]
    assert (
        found.train.content_hash()
        == find_sources(DataConfig(path=str(tmp_path / "saved")), 0).train.content_hash()
    )


def test_tables_with_timestamps_are_refused(tmp_path):
    import datetime

    rows = [{"input": "a", "output": datetime.datetime(2020, 1, 1)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = find_sources(DataConfig(path=str(tmp_path / "rows.parquet")), 0)
    with pytest.raises(
        UserError, match="row 1: output: expected text; found a timestamp"
    ) as caught:
        read_examples(found.train, "auto")
    assert "data.path=<snapshot folder>" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("trian.jsonl", "data.path: trian.jsonl does not exist", "did you mean train.jsonl?"),
        (
            "other.csv",
            "other.csv does not exist; {here} holds blank.jsonl, empty",
            "data.path=FILE",
        ),
        ("no/such/x.csv", "its folder neither, only {here} does", "apptainer --bind"),
        (
            "notes.txt",
            "notes.txt has an unknown ending; expected .jsonl .json",
            "name it notes.jsonl",
        ),
        ("empty.jsonl", "empty.jsonl holds no rows (0 bytes)", "check what wrote it"),
        ("blank.jsonl", "blank.jsonl holds no rows (3 bytes)", "check what wrote it"),
        ("folder", "no data in the folder folder; looked for train, training,", "data.path=FILE"),
    ],
)
def test_what_is_missing(tmp_path, monkeypatch, write_jsonl, path, message, hint):
    monkeypatch.chdir(tmp_path)
    write_jsonl(pairs())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        read_examples(find_sources(DataConfig(path=path), 0).train, "auto")
    assert message.format(here=tmp_path) in caught.value.message
    assert hint in caught.value.hint


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path):
    """No network, and no snapshot: hub names are tables of the datasets library, or nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_an_offline_hub_name_says_what_fetches_it(monkeypatch, empty_hub_cache):

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as caught:
        find_sources(DataConfig(path="org/name"), 0)
    assert "org/name is no file or folder here" in caught.value.message
    assert "not found offline (HF_HUB_OFFLINE=1)" in caught.value.message
    assert "HF_HUB_OFFLINE=0 lora-train prefetch" in caught.value.hint


def test_a_hub_dataset_that_needs_a_subset(monkeypatch, empty_hub_cache):
    def several(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", several)
    with pytest.raises(UserError) as caught:
        find_sources(DataConfig(path="openai/gsm8k"), 0)
    assert "Config name is missing." in caught.value.message
    assert caught.value.hint == "data.subset= one of ['main', 'socratic']"


def test_tables_of_another_revision_are_not_taken(monkeypatch, tmp_path, empty_hub_cache):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    table = datasets.Dataset.from_list(pairs(["a"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=table))
    commits = "a" * 40, "b" * 40
    (tmp_path / "hf/org___name/default/0.0.0" / commits[0]).mkdir(parents=True)
    (tmp_path / "hf/org___name/default/0.0.0" / commits[0] / "dataset_info.json").touch()
    find_sources(DataConfig(path="org/name", revision=commits[0]), 0)
    with pytest.raises(UserError, match="org/name is no file or folder here"):
        find_sources(DataConfig(path="org/name", revision=commits[1]), 0)


def test_hub_rows_with_filled_in_nulls(monkeypatch, empty_hub_cache):
    table = datasets.Dataset.from_list([{"input": "a", "output": "b", "instruction": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=table))
    found = find_sources(DataConfig(path="org/name"), 0)
    assert read_examples(found.train, "auto").items == [InputOutput("a", "b")]


def test_held_out_rows_are_a_pure_function_of_the_seed(write_jsonl):
    data = DataConfig(path=str(write_jsonl(pairs([str(i) for i in range(100)]))))

    def sets(seed):
        train, validation = read_sets(find_sources(data, seed), data, seed)
        return [item.input for item in train.items], [item.input for item in validation.items]

    train, validation = sets(1)
    assert len(validation) == 5 and sorted(train + validation) == sorted(map(str, range(100)))
    assert sets(1) == (train, validation)
    assert sets(2)[1] != validation


def squad():
    def row(i, answers):
        return {
            "id": str(i),
            "title": "t",
            "context": f"Caf\u00e9 number {i}",
            "question": f"Which number is {i}?",
            "answers": {"text": answers, "answer_start": [0] * len(answers)},
        }

    return datasets.DatasetDict(
        train=datasets.Dataset.from_list([row(i, [f"number {i}"]) for i in range(40)]),
        validation=datasets.Dataset.from_list([row(i, ["a", f"b{i}"]) for i in range(3)]),
    )


def test_squad_is_written_as_nemo_writes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DATASETS_CACHE", str(tmp_path / "nemo"))
    monkeypatch.chdir(tmp_path)
    loads = []
    monkeypatch.setattr(sources, "_load_hub", lambda *name: loads.append(name) or squad())
    found = find_sources(DataConfig(path="squad"), seed=1234)

    # SquadDataModule._preprocess_and_split_data, with its defaults
    halves = squad()["train"].train_test_split(test_size=0.05, seed=1234)
    for name, rows in (
        ("training", halves["train"]),
        ("validation", halves["test"]),
        ("test", squad()["validation"]),
    ):
        expected = ""
        for example in rows:
            line = {
                "input": "Context: " + example["context"] + " Question: " + example["question"]
                + " Answer:",
                "output": example["answers"]["text"][0],
            }  # fmt: skip
            if name == "test":
                line["original_answers"] = example["answers"]["text"]
            expected += json.dumps(line) + "\n"
        assert (tmp_path / "nemo" / "squad" / f"{name}.jsonl").read_text() == expected
    assert sorted(file.name for file in (tmp_path / "nemo" / "squad").iterdir()) == [
        "test.jsonl",
        "training.jsonl",
        "validation.jsonl",
    ]
    assert len(inputs(found.train)) == 38 and len(inputs(found.validation)) == 2

    # what is there is used as it is, whatever made it
    (tmp_path / "nemo" / "squad" / "training.jsonl").write_text(json.dumps(pairs(["x"])[0]) + "\n")
    assert inputs(find_sources(DataConfig(path="squad"), seed=9).train) == ["x"]
    assert len(loads) == 1


def test_where_nemo_keeps_squad(monkeypatch, tmp_path):
    from lora_train.data.nemo_squad import nemo_squad_folder

    monkeypatch.delenv("NEMO_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("NEMO_HOME", str(tmp_path))
    assert nemo_squad_folder() == tmp_path / "datasets" / "squad"
    monkeypatch.delenv("NEMO_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nemo_squad_folder() == tmp_path / ".cache" / "nemo" / "datasets" / "squad"


def test_squad_that_cannot_be_loaded_names_the_folder_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_DATASETS_CACHE", str(tmp_path / "nemo"))
    monkeypatch.chdir(tmp_path)

    def unreachable(*name):
        raise UserError("no hub")

    monkeypatch.setattr(sources, "_load_hub", unreachable)
    with pytest.raises(UserError, match=re.escape("no training.jsonl in NeMo's folder")) as caught:
        find_sources(DataConfig(path="squad"), 0)
    assert "NEMO_DATASETS_CACHE" in caught.value.hint
