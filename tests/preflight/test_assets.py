"""Model and data: here, elsewhere, to be fetched, or out of reach."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path

import pytest

from lora_train.preflight import hub
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
        here = dataclasses.replace(machine, words=words)
        return {each.check: each for each in check_assets(here, configured(*words))}

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
    assert found["model"].why.startswith("HF_HUB_OFFLINE=1 turns the network off; fetch it")
    variables = f"HF_HUB_OFFLINE=0 HF_HOME={tmp_path / 'hf'}"
    programs = Path(sys.executable).parent
    assert (
        found["model"].mend
        == found["data"].mend
        == (
            f"{variables} {programs / 'lora-train'} prefetch {MODEL} model.revision=v2 {DATA} "
            "data.subset=en"
        )
    )


def test_the_line_that_fetches_can_be_pasted(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "my caches"))
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    mend = judge(MODEL, DATA)["data"].mend
    assert shlex.split(mend)[:4] == [
        "HF_HUB_OFFLINE=0",
        "HF_DATASETS_OFFLINE=0",
        f"HF_HOME={tmp_path / 'my caches'}",
        f"HF_HUB_CACHE={tmp_path / 'hub'}",
    ]
    monkeypatch.setenv("APPTAINER_CONTAINER", "/my images/lora.sif")
    words = shlex.split(judge(MODEL, DATA)["model"].mend)
    assert words[4:7] == ["singularity", "exec", "/my images/lora.sif"]
    assert words[8:] == ["prefetch", MODEL, DATA]


def test_in_the_image_its_programs_are_called_by_name(judge, root, monkeypatch):
    (root / "opt/lora").mkdir(parents=True)
    (root / "opt/lora/image.json").touch()
    (root / ".dockerenv").touch()
    monkeypatch.setenv("HF_HOME", "/workspace/my caches")
    assert judge(MODEL, DATA)["model"].mend == (
        "docker run -e HF_HUB_OFFLINE=0 -e HF_HOME='/workspace/my caches' "
        f'-v "$PWD":/workspace IMAGE lora-train prefetch {MODEL} {DATA}'
    )


def test_which_variable_turns_the_network_off(judge, reachable, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert judge(MODEL, DATA)["model"].why.startswith("TRANSFORMERS_OFFLINE=1 ")
    # huggingface_hub reads the second only where the first is not set
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert [each.level for each in judge(MODEL, DATA).values()] == ["ok", "ok"]
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert [each.level for each in judge(MODEL, DATA).values()] == ["ok", "error"]


def test_an_unreachable_hub(judge):
    found = judge(MODEL, DATA)
    assert found["model"].level == found["data"].level == "error"
    assert found["model"].why.startswith("127.0.0.1:9 cannot be reached (Connection refused)")
    assert f"lora-train prefetch {MODEL} {DATA}" in found["model"].mend


def test_a_hub_that_answers(judge, reachable):
    found = judge(MODEL, DATA)
    assert found["model"].level == found["data"].level == "ok"
    assert found["model"].seen.endswith("(about 13.0 GiB to fetch); will be downloaded")
    assert found["model"].mend == found["model"].why == ""


def test_what_is_there_is_not_fetched_again(judge, reachable, tmp_path):
    blobs = tmp_path / "home/.cache/huggingface/hub/models--org--model-7B/blobs"
    blobs.mkdir(parents=True)
    with (blobs / "hash.incomplete").open("wb") as sparse:
        sparse.truncate(10 * 2**30)
    assert "(about 3.0 GiB to fetch)" in judge(MODEL, DATA)["model"].seen


def test_the_way_to_the_hub_is_the_proxy(judge, reachable, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # of another scheme
    assert judge(MODEL, DATA)["model"].level == "ok"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert judge(MODEL, DATA)["model"].level == "error"
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert judge(MODEL, DATA)["model"].level == "ok"
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "socks5h://127.0.0.1")
    assert judge(MODEL, DATA)["model"].why.startswith("127.0.0.1:1080 cannot be reached")


def test_a_hub_behind_a_proxy(judge, reachable, monkeypatch):
    monkeypatch.setenv("http_proxy", os.environ["HF_ENDPOINT"])
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert judge(MODEL, DATA)["model"].level == "ok"


def test_a_slow_answer_stops_no_run(judge, monkeypatch):
    monkeypatch.setattr(hub, "_CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_, **__: time.sleep(10))
    found = judge(MODEL, DATA)["model"]
    assert (found.level, found.why.split(";")[0]) == (
        "warning", "127.0.0.1:9 does not answer within 0 s",
    )  # fmt: skip


def test_the_embedded_model_is_not_here(judge, monkeypatch):
    found = judge()["model"]
    assert found.level == "warning"  # pip may reach what it fetches from
    assert "-m lora_train.quickstart" in found.mend
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert judge()["data"].level == "warning"


def test_the_embedded_model_may_not_be_read(judge, monkeypatch):
    is_dir = Path.is_dir

    def refuse(folder):
        if "quickstart" in folder.parts:
            raise PermissionError
        return is_dir(folder)

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert judge()["model"].level == "warning"


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
    # it is taken, whatever an index beside it says
    (folder / "model.safetensors").touch()
    assert judge(MODEL, DATA)["model"].level == "ok"


def test_a_cached_model_with_pickled_weights_only(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot(tmp_path / "home/.cache/huggingface/hub", shards=("pytorch_model.bin",))
    found = judge(MODEL, DATA)["model"]
    assert found.level == "error"
    assert found.mend.startswith("model.allow_pickle=true")
    assert judge(MODEL, DATA, "model.allow_pickle=true")["model"].level == "ok"


def test_a_name_of_the_hub_may_begin_with_any_sign(judge, reachable):
    assert judge("model.path=org/_name", DATA)["model"].level == "ok"


def test_local_models(judge, workplace):
    assert judge("model.path=./model")["model"].level == "error"
    (workplace / "model").mkdir()
    assert "has no config.json" in judge("model.path=./model")["model"].seen
    (workplace / "model/config.json").write_text("{}")
    assert "has no *.safetensors" in judge("model.path=./model")["model"].seen
    (workplace / "model/pytorch_model.bin").touch()
    assert "model.allow_pickle=true" in judge("model.path=./model")["model"].mend
    allowed = ("model.path=./model", "model.allow_pickle=true")
    assert "has no tokenizer" in judge(*allowed)["model"].seen
    (workplace / "model/tokenizer.json").touch()
    assert judge(*allowed)["model"].level == "ok"
    (workplace / "model.gguf").touch()
    assert judge("model.path=model.gguf")["model"].level == "ok"
    assert judge("model.path=embedded:other")["model"].level == "error"


def test_pointers_stand_for_no_weights(judge, workplace):
    (workplace / "a model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (workplace / "a model" / name).write_text("{}")
    for file in (workplace / "a model/model.safetensors", workplace / "model.gguf"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    found = judge("model.path=a model")["model"]
    assert found.level == "error"
    assert "model.safetensors is a pointer of git-lfs" in found.seen
    assert found.mend == "git -C 'a model' lfs pull"
    assert judge("model.path=model.gguf")["model"].mend == "git -C . lfs pull"


def test_local_data(judge, workplace):
    (workplace / "chats.jsonl").write_text("{}\n")
    assert judge("data.path=chats.jsonl")["data"].level == "ok"
    found = judge("data.path=chat.jsonl")["data"]
    assert found.level == "error"
    assert found.mend == "did you mean chats.jsonl?"
    (workplace / "chats").mkdir()
    assert judge("data.path=chats")["data"].level == "error"
    (workplace / "chats/part.jsonl").write_text("{}\n")
    assert judge("data.path=chats")["data"].level == "ok"
    found = judge("data.path=chats.jsonl", "data.validation_path=none.jsonl")["data"]
    assert found.seen == "data.validation_path=none.jsonl does not exist"


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_squad(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NEMO_HOME", str(tmp_path / "nemo"))
    mend = judge("data.path=squad")["data"].mend
    assert mend.endswith(" prefetch data.path=squad") and f"NEMO_HOME={tmp_path / 'nemo'}" in mend
    (tmp_path / "nemo/datasets/squad").mkdir(parents=True)
    (tmp_path / "nemo/datasets/squad/training.jsonl").touch()
    assert judge("data.path=squad")["data"].level == "ok"
    monkeypatch.delenv("NEMO_HOME")
    with monkeypatch.context() as nobody:
        nobody.setattr(Path, "home", no_home)
        assert judge("data.path=squad")["data"].mend == "export NEMO_HOME=/path/on/scratch"
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
