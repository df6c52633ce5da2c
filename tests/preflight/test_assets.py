"""Model and data: here, elsewhere, to be fetched, or out of reach."""

from __future__ import annotations

import json
import socket

import pytest

from lora_train.preflight.asset_checks import check_assets

MODEL, DATA = "model.path=org/model-7B", "data.path=org/DataSet"


def snapshot(cache, *, shards=("model.safetensors",), missing=()):
    folder = cache / "models--org--model-7B/snapshots/abc"
    folder.mkdir(parents=True)
    (cache / "models--org--model-7B/refs").mkdir()
    (cache / "models--org--model-7B/refs/main").write_text("abc")
    (folder / "config.json").write_text("{}")
    if len(shards) > 1:
        index = {"weight_map": {f"layer{number}": name for number, name in enumerate(shards)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in set(shards) - set(missing):
        (folder / name).touch()
    return folder


def table(cache, name="org___data_set", subset="default"):
    folder = cache / name / subset / "0.0.0/hash"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture
def judge(machine, configured):
    def judge(*words):
        return {each.check: each for each in check_assets(machine, configured(*words))}

    return judge


@pytest.fixture
def reachable(monkeypatch):
    """A hub that takes a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def test_both_in_the_caches(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot(tmp_path / "hf/hub")
    table(tmp_path / "hf/datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {name: each.level for name, each in judge(MODEL, DATA).items()} == {
        "model": "ok",
        "data": "ok",
    }
    assert judge(MODEL, DATA, "data.subset=other")["data"].level == "error"
    # another revision is another download
    assert judge(MODEL, DATA, "model.revision=v2")["model"].level == "error"
    assert judge(MODEL, DATA, "model.revision=abc")["model"].level == "ok"


def test_offline_and_not_here(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = judge(MODEL, "model.revision=v2", DATA, "data.subset=en")
    assert found["model"].level == found["data"].level == "error"
    assert found["model"].why == "HF_HUB_OFFLINE=1 keeps it from being fetched"
    assert found["model"].mend == (
        f"HF_HUB_OFFLINE=0 HF_HOME={tmp_path / 'hf'} hf download org/model-7B --revision v2"
    )
    assert "datasets.load_dataset('org/DataSet', name='en')" in found["data"].mend


def test_an_unreachable_hub(judge):
    found = judge(MODEL, DATA)
    assert found["model"].level == found["data"].level == "error"
    assert found["model"].why.startswith("127.0.0.1:9 cannot be reached (Connection refused)")
    assert "hf download org/model-7B" in found["model"].mend


def test_a_hub_that_answers(judge, reachable):
    found = judge(MODEL, DATA)
    assert found["model"].level == found["data"].level == "ok"
    assert found["model"].seen.endswith("(about 13.0 GiB); will be downloaded")


def test_the_way_to_the_hub_is_the_proxy(judge, reachable, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert judge(MODEL, DATA)["model"].level == "error"


def test_a_model_in_the_other_cache(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    default = tmp_path / "home/.cache/huggingface/hub"
    snapshot(default)
    assert judge(MODEL, DATA)["model"].mend == f"export HF_HUB_CACHE={default}"
    monkeypatch.setenv("HF_HUB_CACHE", str(default))
    assert judge(MODEL, DATA)["model"].level == "ok"


def test_a_download_that_was_cut_short(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shards = ("model-1.safetensors", "model-2.safetensors")
    folder = snapshot(tmp_path / "home/.cache/huggingface/hub", shards=shards, missing=shards[1:])
    found = judge(MODEL, DATA)["model"]
    assert found.level == "error"
    assert "without model-2.safetensors" in found.seen
    found = judge(f"model.path={folder}", DATA)["model"]
    assert (found.level, found.seen) == ("error", f"model.path={folder} has no model-2.safetensors")


def test_local_models(judge, workplace):
    assert judge("model.path=./model")["model"].level == "error"
    (workplace / "model").mkdir()
    assert "has no config.json" in judge("model.path=./model")["model"].seen
    (workplace / "model/config.json").write_text("{}")
    assert "has no *.safetensors" in judge("model.path=./model")["model"].seen
    (workplace / "model/pytorch_model.bin").touch()
    assert "model.allow_pickle=true" in judge("model.path=./model")["model"].mend
    assert judge("model.path=./model", "model.allow_pickle=true")["model"].level == "ok"
    (workplace / "model.gguf").touch()
    assert judge("model.path=model.gguf")["model"].level == "ok"
    assert judge("model.path=embedded:other")["model"].level == "error"


def test_local_data(judge, workplace):
    (workplace / "chats.jsonl").write_text("{}\n")
    assert judge("data.path=chats.jsonl")["data"].level == "ok"
    found = judge("data.path=chat.jsonl")["data"]
    assert found.level == "error"
    assert found.mend == "did you mean chats.jsonl?"
    found = judge("data.path=chats.jsonl", "data.validation_path=none.jsonl")["data"]
    assert found.seen == "data.validation_path=none.jsonl does not exist"


def test_squad(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "load_dataset('rajpurkar/squad')" in judge("data.path=squad")["data"].mend
    monkeypatch.setenv("NEMO_HOME", str(tmp_path / "nemo"))
    (tmp_path / "nemo/datasets/squad").mkdir(parents=True)
    (tmp_path / "nemo/datasets/squad/training.jsonl").touch()
    assert judge("data.path=squad")["data"].level == "ok"
    monkeypatch.delenv("NEMO_HOME")
    table(tmp_path / "home/.cache/huggingface/datasets", "rajpurkar___squad", "plain_text")
    assert judge("data.path=squad")["data"].level == "ok"


def test_what_datasets_keeps_is_found(judge, monkeypatch, tmp_path, workplace):
    """The real library's cache, for a dataset's name that it turns into snake case."""
    import datasets

    folder = workplace / "source/MyData"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    cache = tmp_path / "tables"
    datasets.load_dataset(str(folder), cache_dir=str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert judge(MODEL, "data.path=MyData")["data"].level == "ok"
    assert judge(MODEL, "data.path=YourData")["data"].level == "error"
