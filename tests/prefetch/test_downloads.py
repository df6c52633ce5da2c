"""Downloads that go wrong, go on, or run beside each other; what may not be had is said."""

from __future__ import annotations

import json
import os

import pytest

MODEL, DATA = "model.path=org/tiny", "data.path=org/words"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hf/hub"


def snapshot(cache, repository):
    (found,) = (cache / repository / "snapshots").iterdir()
    return found


def test_what_cannot_be_had_is_refused_before_any_download(hub, fetch, tmp_path):
    hub.repository("models", "org/gated").push({"config.json": b"{}", "model.safetensors": b"0"})
    hub.repository("models", "org/gated").is_gated = True
    hub.repository("models", "org/pickled").push({"config.json": b"{}", "pytorch_model.bin": b"0"})
    hub.repository("models", "org/other").push({"weights.safetensors": b"0"})
    hub.repository("models", "org/named").push({"config.json": b"{}", "a.safetensors": b"0"})
    cases = {
        ("model.path=org/missing", DATA): "neither a folder here nor a repository on the hub",
        (MODEL, "model.revision=v9", DATA): "model.path=org/tiny has no revision 'v9'",
        ("model.path=org/pickled", DATA): "set model.allow_pickle=true",
        ("model.path=org/other", DATA): "model.path=org/other has no config.json",
        ("model.path=org/named", DATA): "none that transformers loads: neither model.safetensors",
        (MODEL, "data.path=org/missing"): "as a hub dataset there is none that can be seen",
        (MODEL, DATA, "data.revision=v9"): "the hub dataset org/words has no revision 'v9'",
        (MODEL, "data.path=org/table"): "data.subset= one of ['big', 'small']",
        (MODEL, DATA, "model.chat_template=no.jinja"): "chat_template: no.jinja does not exist",
        (MODEL, DATA, "--bundle"): "--bundle: needs a value",
        (MODEL, "data.seq_lenght=9"): "did you mean `data.seq_length`?",
    }
    for done, expected in zip(fetch(*map(list, cases)), cases.values(), strict=True):
        assert done.status == 2 and expected in done.err, done
    for foreign in ("thesis/chapter.tex", "site/manifest.json", "site/data/rows.csv"):
        (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / foreign).write_text("{}")
    hub.faults[SHARD] = "huge"
    gated, foreign, site, room = fetch(
        ["model.path=org/gated", DATA],
        [MODEL, DATA, "--bundle", "thesis"],
        [MODEL, DATA, "--bundle", "site"],
        [MODEL, DATA, "--bundle", "bundle"],
    )
    assert gated.status == foreign.status == site.status == room.status == 2
    assert "org/gated is a gated repository, and HF_TOKEN is not set" in gated.err
    assert "accept its terms on" in gated.err
    assert "thesis is no bundle: it holds chapter.tex" in foreign.err
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert "site is no bundle: it holds data, manifest.json" in site.err
    assert (tmp_path / "site/data/rows.csv").is_file()  # what is not fetched leaves a bundle
    assert "909.5 TiB are to be fetched into bundle, and " in room.err
    assert "hint: --bundle DIR on a file system with room" in room.err
    assert not [path for path in hub.fetched if path.endswith((".safetensors", ".bin", ".jsonl"))]


def test_no_network(fetch):
    offline, closed = (
        fetch([MODEL, DATA], HF_HUB_OFFLINE="1")[0],
        fetch([MODEL, DATA], HF_ENDPOINT="http://127.0.0.1:9")[0],
    )
    assert offline.status == closed.status == 2
    assert "HF_HUB_OFFLINE=1 turns the network off" in offline.err
    assert "127.0.0.1:9 cannot be reached (Connection refused)" in closed.err
    assert "such as a login node" in closed.err


def test_caches_that_cannot_be_written_are_seen_before_any_download(hub, fetch, tmp_path):
    (tmp_path / "file").touch()
    (hub_cache,) = fetch([MODEL, DATA], HF_HOME=str(tmp_path / "file"))
    (ours,) = fetch([MODEL, DATA], LORA_CACHE_DIR=str(tmp_path / "file"))
    assert hub_cache.status == ours.status == 2
    assert f"the hub cache {tmp_path / 'file/hub'} cannot be written: Not a dir" in hub_cache.err
    assert f"cannot write {tmp_path / 'file/prefetch'}" in ours.err
    assert "hint: export LORA_CACHE_DIR=DIR" in ours.err
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]


@pytest.mark.parametrize("place", [[], ["--bundle", "bundle"]])
def test_a_download_that_was_cut_off_goes_on(hub, fetch, place, tmp_path):
    hub.faults[SHARD] = "half"
    line = [MODEL, DATA, *place]
    (done,) = fetch(line)
    assert done.status == 2
    assert "the hub stopped answering over org/tiny" in done.err
    assert "give the same command again: complete files are kept" in done.err
    assert not list(tmp_path.rglob("manifest.json"))
    hub.faults.clear()
    before = list(hub.fetched)
    (done,) = fetch(line)
    assert done.status == 0, done.err
    again = hub.fetched[len(before) :]
    assert SHARD in again
    assert "model-00001-of-00002.safetensors" in before
    assert "model-00001-of-00002.safetensors" not in again


def test_a_file_that_the_hub_serves_wrong_is_named_and_not_kept(hub, fetch, cache):
    hub.faults = {SHARD: "wrong", "config.json": "wrong"}
    (done,) = fetch([MODEL, DATA])
    assert done.status == 2
    assert f"{SHARD}: sha256 " in done.err and "config.json: git hash " in done.err
    assert not (snapshot(cache, "models--org--tiny") / SHARD).exists()
    assert not (cache / "models--org--tiny/refs").exists()  # not taken for whole
    hub.faults.clear()
    (done,) = fetch([MODEL, DATA])
    assert done.status == 0, done.err


def test_a_damaged_file_is_fetched_again(hub, fetch, cache, model_files):
    assert fetch([MODEL, DATA])[0].status == 0
    folder = snapshot(cache, "models--org--tiny")
    assert sorted(os.listdir(folder)) == [  # what a run loads, and no duplicate of it
        "chat_template.jinja", "config.json", "generation_config.json",
        "model-00001-of-00002.safetensors", SHARD, "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    file = folder / SHARD
    content = file.read_bytes()
    assert content == model_files[SHARD]
    file.resolve().write_bytes(content[:-1] + b"x")
    hub.fetched.clear()
    verify = ["--verify", "cache/prefetch/org-tiny--org-words.json"]
    damaged, done, whole = fetch(verify, [MODEL, DATA], verify)
    assert damaged.status == 2 and f"{file} was changed: its sha256 is another" in damaged.err
    assert f"hint: lora-train prefetch {MODEL} {DATA}" in damaged.err
    assert whole.status == 0 and "model.revision=" in whole.out.splitlines()[-1]
    assert done.status == 0 and f"{SHARD} is fetched again: sha256" in done.err
    assert [path for path in hub.fetched if path.endswith("safetensors")] == [SHARD]
    assert file.read_bytes() == content


def test_two_at_once(hub, start_fetching, tmp_path, model_files):
    line = [MODEL, DATA, "--bundle", "bundle"]
    for ends in [start_fetching(line), start_fetching(line)]:
        (done,) = ends()
        assert done.status == 0, done.err
    assert (tmp_path / "bundle/model" / SHARD).read_bytes() == model_files[SHARD]
    assert hub.fetched.count(SHARD) == 1  # one waited for the other


def test_a_branch_is_pinned_and_a_commit_stays(hub, fetch, cache, dataset_files):
    repository = hub.repository("datasets", "org/words")
    first = repository.refs["main"]
    (done,) = fetch([MODEL, DATA])
    assert f"data: org/words main -> {first}" in done.out
    assert f"    data.revision={first}" in done.out
    assert f" data.revision={first}" in done.out.splitlines()[-1]
    second = repository.push({**dataset_files["org/words"], "data/train.jsonl": b'{"text": "b"}\n'})
    pinned, moved = fetch([MODEL, DATA, f"data.revision={first}"], [MODEL, DATA])
    assert f"org/words {first} -> {first}" in pinned.out
    assert f"org/words main -> {second}" in moved.out
    texts = {
        commit: (cache / f"datasets--org--words/snapshots/{commit}/data/train.jsonl").read_bytes()
        for commit in (first, second)
    }
    assert texts == {
        commit: files["data/train.jsonl"] for commit, files in repository.commits.items()
    }


def test_squad_becomes_files_of_nemo(hub, fetch, tmp_path, offline, python):
    (cached, bundled) = fetch(
        [MODEL, "data.path=squad"], [MODEL, "data.path=squad", "--bundle", "bundle"]
    )
    assert cached.status == bundled.status == 0, cached.err + bundled.err
    commit = hub.repository("datasets", "rajpurkar/squad").refs["main"]
    assert f"data: rajpurkar/squad main -> {commit}: 3 files" in cached.out
    assert f"NEMO_HOME={tmp_path / 'nemo'}" in cached.out.splitlines()[-1]
    assert "data.path=squad" in cached.out.splitlines()[-1]
    folders = tmp_path / "nemo/datasets/squad", tmp_path / "bundle/data"
    for name in ("training", "validation", "test"):
        one, other = ((folder / f"{name}.jsonl").read_bytes() for folder in folders)
        assert one == other
    assert (folders[0] / "training.jsonl").read_text().count("\n") == 38


def test_a_bundle_is_made_anew_in_its_place(hub, fetch, tmp_path):
    line = [MODEL, "data.path=org/table", "data.subset=small", "--bundle", "bundle"]
    assert fetch(line)[0].status == 0
    assert (tmp_path / "bundle/data/small/train-00000-of-00002.parquet").is_file()
    hub.fetched.clear()
    (done,) = fetch([MODEL, DATA, "--bundle", "bundle"])
    assert done.status == 0, done.err
    assert not [path for path in hub.fetched if path.endswith("safetensors")]
    held = [file for file in (tmp_path / "bundle/data").rglob("*") if file.is_file()]
    assert sorted(file.name for file in held) == [
        "README.md", "lora_splits.json", "train.jsonl", "validation.jsonl",
    ]  # fmt: skip
    names = [
        each["name"]
        for each in json.loads((tmp_path / "bundle/manifest.json").read_text())["fetched"]
    ]
    assert names == ["org/tiny", "org/words"]
