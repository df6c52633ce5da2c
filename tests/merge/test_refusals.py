"""What is refused before anything is written, and that nothing is left of what fails later."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_train.errors import UserError
from lora_train.merge import job, tensor_files


@pytest.fixture
def refused(merge, tmp_path, capsys):
    """Calls the command, which must end with 2 and write nothing; returns what it said."""

    def call(run, *words):
        before = set(tmp_path.iterdir())
        capsys.readouterr()
        assert merge(run, tmp_path / "out", "--no-proof", *words) == 2
        assert set(tmp_path.iterdir()) - {tmp_path / "cache"} <= before
        said = capsys.readouterr().err
        assert "hint:" in said
        return said

    return call


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_adapter(run, change):
    file = run / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_base_of_another_shape(make_run, refused, base_folder):
    made = make_run()
    wider = base_folder("llama", intermediate_size=128)
    said = refused(made.path, "--base", str(wider))
    assert "down_proj is for a weight of 64 x 96" in said and "has 64 x 128" in said


def test_a_base_with_fewer_or_more_layers(make_run, refused, base_folder):
    made = make_run()
    said = refused(made.path, "--base", str(base_folder("llama", num_hidden_layers=1)))
    assert "changes model.layers.1." in said
    said = refused(made.path, "--base", str(base_folder("llama", num_hidden_layers=3)))
    assert "has 7 layers that the adapter targets" in said and "model.layers.2." in said


def test_a_base_with_other_layer_names(make_run, refused, base_folder):
    said = refused(make_run().path, "--base", str(base_folder("gpt2")))
    assert "model.layers.0.mlp.down_proj.weight" in said and "does not have" in said


def test_other_weights_than_the_recorded_ones(make_run, merge, refused, tmp_path):
    made = make_run()
    digest = hashlib.sha256((made.base / "model.safetensors").read_bytes()).hexdigest()
    start = {
        "base": {
            "path": str(made.base), "revision": None, "commit": None,
            "files": {"model.safetensors": {"size": 1, "sha256": digest}},
        }
    }  # fmt: skip
    (made.path / "environment.json").write_text(json.dumps([{"command": []}, start]))
    copy = tmp_path / "copy"
    shutil.copytree(made.base, copy)
    # the same model, one number of it changed
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    said = refused(made.path, "--base", str(copy))
    assert f"the run was made on {digest[:12]}" in said
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    checked = json.loads((tmp_path / "out/merge_proof.json").read_text())["base"]["checked_by"]
    assert "SHA-256" in checked


def test_another_commit_of_the_hub(make_run, refused, tmp_path):
    made = make_run()
    snapshot = tmp_path / "hub/models--org--name/snapshots" / ("b" * 40)
    shutil.copytree(made.base, snapshot)
    base = {"path": "org/name", "revision": None, "commit": "a" * 40, "files": {}}
    (made.path / "environment.json").write_text(json.dumps([{"base": base}]))
    said = refused(made.path, "--base", str(snapshot))
    assert "commit bbbbbbbbbbbb" in said and "--revision aaaaaaaa" in said


@pytest.mark.parametrize("words", [["--quantize"], ["--quantize=nf4"]])
def test_a_quantized_target(make_run, refused, words):
    assert "throws most of the adapter away" in refused(make_run().path, *words)


def test_a_quantized_base(make_run, refused, tmp_path):
    made = make_run()
    shutil.copytree(made.base, tmp_path / "awq")
    edit_json(tmp_path / "awq/config.json", quantization_config={"quant_method": "awq"})
    said = refused(made.path, "--base", str(tmp_path / "awq"))
    assert "is quantized (awq)" in said and "serve the quantized base with the adapter" in said


def test_pickled_and_cut_off_weights(make_run, refused, tmp_path):
    made = make_run()
    shutil.copytree(made.base, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "was cut short" in refused(made.path, "--base", str(tmp_path / "copy"))
    file.unlink()
    (tmp_path / "copy/pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refused(made.path, "--base", str(tmp_path / "copy"))


def test_a_gguf_file_in_place_of_the_run_s_base(make_run, refused, tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    said = refused(make_run().path, "--base", str(tmp_path / "model-Q4_K_M.gguf"))
    assert "is a GGUF file" in said and "throws most of the adapter away" in said


def test_a_base_that_is_not_there_any_more(make_run, refused, base_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base_folder(), moved)
    run = make_run(base=moved).path
    moved.rename(tmp_path / "elsewhere")
    assert "--base FOLDER names a copy" in refused(run)
    assert "--base /gone: no such" in refused(run, "--base", "/gone")


def test_one_file_beside_an_index_is_what_transformers_loads(make_run, merge, tmp_path):
    made = make_run()
    copy = tmp_path / "copy"
    shutil.copytree(made.base, copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    assert merge(made.path, tmp_path / "out", "--no-proof", "--base", str(copy)) == 0
    (copy / "model.safetensors").rename(copy / "old.safetensors")
    assert tensor_files.weight_files(copy) == [copy / "old.safetensors"]


@pytest.mark.parametrize(
    "header", [b"[1]", b"{}}", b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": "F32", "shape": [2], '
    b'"data_offsets": [0, 4]}}']
)  # fmt: skip
def test_a_header_that_is_none(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(UserError, match="is no safetensors file"):
        tensor_files.read_header(file)


def test_an_adapter_that_is_not_wholly_understood(make_run, refused):
    run = make_run().path
    b = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def add(tensors):
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_C.weight"] = torch.ones(2)

    edit_adapter(run, add)
    assert "lora_C" in refused(run)
    edit_adapter(run, lambda tensors: tensors.pop(next(k for k in tensors if "lora_C" in k)))
    edit_adapter(run, lambda tensors: tensors.pop(b))
    assert "model.layers.1.mlp.down_proj lacks its lora_B" in refused(run)
    edit_adapter(run, lambda tensors: tensors.update({b: torch.ones(64, 4)}))
    settings = run / "adapter/adapter_config.json"
    edit_json(settings, r=8)
    assert "says that the rank is 8" in refused(run)
    edit_json(settings, r=4, trainable_token_indices=[1])
    assert "trainable_token_indices" in refused(run)
    edit_json(settings, trainable_token_indices=None, peft_type="IA3")
    assert "IA3" in refused(run)


def test_an_adapter_with_nan_leaves_nothing(make_run, merge, tmp_path, capsys):
    run = make_run().path

    def spoil(tensors):
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = float("nan")

    edit_adapter(run, spoil)
    assert merge(run, tmp_path / "models/out", "--no-proof") == 2
    assert "merged model.layers.1.mlp.up_proj.weight is not finite" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_not_empty_stays_as_it_is(make_run, merge, tmp_path, capsys):
    made = make_run()
    (tmp_path / "out").mkdir()
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    before = (tmp_path / "out/config.json").stat().st_mtime_ns
    assert merge(made.path, tmp_path / "out", "--no-proof") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out/config.json").stat().st_mtime_ns == before


def test_an_output_that_cannot_be_made(make_run, merge, tmp_path, capsys, monkeypatch):
    made = make_run()
    monkeypatch.chdir(tmp_path)
    assert merge(made.path, Path("."), "--no-proof") == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "file").touch()
    words = ["--no-proof", "--base-name", "org/model"]
    assert merge(made.path, tmp_path / "file/out", *words) == 2
    assert "cannot be written" in capsys.readouterr().err
    # nothing was changed on the way
    settings = json.loads((made.path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] != "org/model"


def test_a_disk_with_too_little_room(make_run, refused, monkeypatch):
    monkeypatch.setattr(job, "free_bytes", lambda _: 1000)
    assert "0.0 GB free" in refused(make_run().path)


def test_a_signal_in_the_middle_leaves_nothing(make_run, merge, tmp_path, monkeypatch):
    made = make_run()
    seen = []

    def stop(descriptor):
        seen.extend(entry.name for entry in (tmp_path / "models").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tensor_files.os, "fsync", stop)
    assert merge(made.path, tmp_path / "models/out", "--no-proof") == 75
    assert len(seen) == 1 and seen[0].startswith(".out.tmp-")
    assert list((tmp_path / "models").iterdir()) == []
