"""What was fetched is used without network, where it lies now, or refused by name."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load

from lora_train.errors import UserError
from lora_train.merge.base_name import BaseName, portable_name
from lora_train.prefetch.trial import read_weights
from lora_train.preflight.hub import missing_weights

MODEL, TABLE = "model.path=org/tiny", "data.path=org/table"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RUN = (
    "data.seq_length=64", "trainer.max_steps=1", "trainer.precision=fp32", "log.trackers=[]",
    "eval.num_generate=0", "log.name=tiny", "data.global_batch_size=2",
)  # fmt: skip


@pytest.mark.slow
def test_the_line_that_prefetch_prints_trains_without_network(
    hub, lora_train, tmp_path, environment, offline
):
    words = (MODEL, TABLE, "data.subset=small", *RUN)
    done = lora_train("prefetch", *words)
    assert done.returncode == 0, done.stderr
    assert "20 tensors of 2 weight file(s), a tokenizer of 258 tokens" in done.stdout
    assert "3 rows of train and 2 rows of validation" in done.stdout
    *_, ready, line = done.stdout.splitlines()
    assert ready == "ready; without network:"
    # a node without network, and without what the line itself sets
    bare = {name: value for name, value in environment.items() if name != "HF_HOME"}
    trained = subprocess.run(
        line, shell=True, cwd=tmp_path, env=bare | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 1
    # by its plain words too
    preflight = lora_train("preflight", "--json", *words, **offline)
    levels = {each["check"]: each["level"] for each in json.loads(preflight.stdout)}
    assert (levels["model"], levels["data"]) == ("ok", "ok")
    # a fetched subset says nothing of another one
    preflight = lora_train("preflight", "--json", *words[:2], "data.subset=big", **offline)
    found = {each["check"]: each for each in json.loads(preflight.stdout)}
    assert found["data"]["level"] == "error"
    assert shlex.split(found["data"]["mend"])[-4:] == [
        "prefetch", MODEL, TABLE, "data.subset=big",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_bundle_is_used_where_it_was_moved_to(hub, lora_train, tmp_path, offline, python):
    (tmp_path / "held.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "mine.yaml").write_text("optim:\n  lr: 3e-3\ndata:\n  seq_length: 64\n")
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }} of my own")
    done = lora_train(
        "prefetch", "--bundle", "bundle", "--config", "mine.yaml", MODEL, TABLE,
        "data.subset=small", "data.validation_path=held.jsonl", "model.chat_template=mine.jinja",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("hf", "held.jsonl", "mine.yaml", "mine.jinja"):  # all of it is in the bundle
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    place = tmp_path / "my scratch"
    place.mkdir()
    (tmp_path / "bundle").rename(place / "llama")
    verified = lora_train("prefetch", "--verify", str(place / "llama"), **offline)
    assert verified.returncode == 0, verified.stderr
    line = shlex.split(verified.stdout.splitlines()[-1])
    assert line[0] == "HF_HUB_OFFLINE=1" and f"data.path={place / 'llama/data'}" in line
    loaded = python(
        "from lora_train.cli import parse_command_line\n"
        "from lora_train.data.sources import find_sources\n"
        "from lora_train.data.examples import read_sets\n"
        "from lora_train.model_source import resolve_model\n"
        f"config = parse_command_line({line[2:]!r}).resolve()\n"
        "train, validation = read_sets(find_sources(config.data, 0), config.data, 0)\n"
        "print(config.optim.lr, len(train.items), len(validation.items), config.log.name)\n"
        "print(resolve_model(config.model))\n"
        "print(open(config.model.chat_template).read())\n",
        offline,
    )
    model, data = place / "llama/model", place / "llama/data"
    assert loaded.splitlines() == [
        "0.003 6 1 quickstart", str(model), "{{ messages[0].content }} of my own",
    ]  # fmt: skip
    # an adapter trained on it names the base that others can load
    commit = hub.repository("models", "org/tiny").refs["main"]
    assert portable_name(str(model)) == BaseName("org/tiny", commit)

    (model / SHARDS[0]).unlink()
    content = (model / SHARDS[1]).read_bytes()
    (model / SHARDS[1]).write_bytes(content[:-1])
    (model / "config.json").write_text((model / "config.json").read_text().replace("64", "65"))
    (model / "model.safetensors").touch()  # would be loaded in place of the shards
    first = data / "small/train-00000-of-00002.parquet"
    first.write_bytes(first.read_bytes() + b"\0")
    damaged = lora_train("prefetch", "--verify", str(place / "llama/manifest.json"))
    assert damaged.returncode == 2
    size = len(content)
    assert damaged.stderr.splitlines()[1:-1] == [
        f"error: 5 files of {place / 'llama/manifest.json'} are not what was fetched:",
        f"  {model / 'config.json'} was changed: its sha256 is another",
        f"  {model / SHARDS[0]} is missing",
        f"  {model / SHARDS[1]} is cut off: {size - 1} bytes instead of {size}",
        f"  {model / 'model.safetensors'} does not belong there",
        f"  {first} is too long: {first.stat().st_size} bytes instead of "
        f"{first.stat().st_size - 1}",
    ]
    # a run sees by the sizes what it would have seen after the queue
    preflight = lora_train("preflight", "--json", *line[2:], **offline)
    found = {each["check"]: each["seen"] for each in json.loads(preflight.stdout)}
    assert found["model"] == f"{model}: {SHARDS[0]} is missing and 1 more"
    assert found["data"].startswith(f"{data}: small/train-00000-of-00002.parquet is too long")
    manifest = place / "llama/manifest.json"
    manifest.write_text(manifest.read_text().replace("org/tiny", "org/evil"))
    tampered = lora_train("prefetch", "--verify", str(place / "llama"))
    assert tampered.returncode == 2 and "was changed since it was written" in tampered.stderr
    manifest.unlink()
    unfinished = lora_train("prefetch", "--verify", str(place / "llama"))
    assert unfinished.returncode == 2 and "writes it last" in unfinished.stderr


def test_no_socket_of_the_trial_reaches_the_network(hub, python):
    output = python(
        "import os, socket, urllib.request\n"
        "from huggingface_hub import get_session\n"
        "from lora_train.prefetch.trial import refuse_network\n"
        "refuse_network()\n"
        "def fails(call):\n"
        "    try: call()\n"
        "    except Exception: return True\n"
        "host, port = os.environ['HF_ENDPOINT'][7:].split(':')\n"
        "print(fails(lambda: socket.create_connection((host, int(port)))),\n"
        "      fails(lambda: urllib.request.urlopen(os.environ['HF_ENDPOINT'])),\n"
        "      fails(lambda: socket.getaddrinfo('localhost', 80)),\n"
        "      fails(lambda: get_session().get(os.environ['HF_ENDPOINT'])))\n"
        "one, other = socket.socketpair()\n"
        "one.send(b'x'); print(other.recv(1))\n"
    )
    assert output.split("\n")[:2] == ["True True True True", "b'x'"]
    assert hub.fetched == []


def test_weights_that_the_index_promises(model_files, tmp_path):
    for name in (*SHARDS, "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(model_files[name])
    assert read_weights(tmp_path, pickled=False) == (20, 2)
    index = json.loads(model_files["model.safetensors.index.json"])
    index["weight_map"]["model.norm.bias"] = SHARDS[0]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks 1 tensors that the index .* such as model.norm.bi"):
        read_weights(tmp_path, pickled=False)
    (tmp_path / SHARDS[0]).write_bytes(model_files[SHARDS[0]][:-1])
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path, pickled=False)


def test_pickled_weights_that_the_index_promises(model_files, tmp_path):
    weights = load(model_files[SHARDS[0]]) | load(model_files[SHARDS[1]])
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        read_weights(tmp_path, pickled=True)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path, pickled=True) == (20, 1)
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        read_weights(tmp_path, pickled=False)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "one.bin")
    index = {"weight_map": dict.fromkeys(weights, "one.bin") | {"more": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two.bin: the weights cannot be read"):
        read_weights(tmp_path, pickled=True)
    assert missing_weights(tmp_path, pickled=True) == ["two.bin"]
    torch.save({"more": torch.zeros(1)}, tmp_path / "two.bin")
    assert read_weights(tmp_path, pickled=True) == (21, 2)
    assert missing_weights(tmp_path, pickled=True) == []


_READ = """
import json, sys
from lora_train.config import DataConfig
from lora_train.data.examples import read_examples
from lora_train.data.sources import find_sources
from lora_train.errors import UserError
for options in json.loads(sys.argv[1]):
    try:
        found = find_sources(DataConfig(**options), 0)
        read = read_examples(found.train, "auto").items
        print(json.dumps([found.train.content_hash(), [row.input for row in read]]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_hub_dataset_is_the_same_files_with_and_without_network(
    hub, environment, offline, tmp_path, dataset_files
):
    def read(variables, *options):
        done = subprocess.run(
            [sys.executable, "-P", "-c", _READ, json.dumps(options)],
            env=variables, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    # what only the datasets library reads
    hub.repository("datasets", "org/packed").push(
        {"train.jsonl.gz": gzip.compress(b'{"input": "a", "output": "b"}\n')}
    )
    # what its card tells how to read
    card = b"---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: ';'\n---\n"
    hub.repository("datasets", "org/told").push(
        {"README.md": card, "rows.csv": b"input;output\na,b;c\n"}
    )
    by_library = {"path": "org/packed"}, {"path": "org/told"}
    small = {"path": "org/table", "subset": "small"}
    repository = hub.repository("datasets", "org/table")
    commit = repository.refs["main"]
    online, packed, told = read(environment, small, *by_library)
    assert (packed[1], told[1]) == (["a"], ["a,b"])
    assert online[1] == [
        f"word {tag} {number} " for tag in ("first", "second") for number in range(3)
    ]
    # an answer that is no longer main's, and a branch that was never asked for
    files = dict(dataset_files["org/table"])
    del files["small/train-00001-of-00002.parquet"]
    newer = repository.push(files)
    *library, again, pinned, other, branch, big = read(
        offline,
        *by_library,
        small,
        {**small, "revision": commit},
        {**small, "revision": newer},
        {**small, "revision": "dev"},
        {**small, "subset": "big"},
    )
    assert library == [packed, told]
    assert again == pinned == online
    for refused in (other, branch, big):
        assert "org/table is no file or folder here, and as a hub dataset: not found" in refused
        assert "HF_HUB_OFFLINE=0 lora-train prefetch, then the words of this run" in refused
    # what the hub calls main counts where it can be asked, a commit needs no asking
    newest, pinned = read(environment, small, {**small, "revision": commit})
    assert newest[1] == online[1][:3] and pinned == online
    # cut off, it is no smaller dataset
    folder = tmp_path / f"hf/hub/datasets--org--table/snapshots/{commit}"
    (folder / "small/train-00001-of-00002.parquet").unlink()
    (lost,) = read(offline, {**small, "revision": commit})
    assert "small/train-00001-of-00002.parquet is missing" in lost
