"""The comparison of base + adapter with the merged model: its figures, and what it catches."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_train.merge import adapter_file, merging, proof_inputs, tensor_files, weights
from lora_train.merge.proof import divergence, kl_limit


def proof_of(folder):
    return json.loads((folder / "merge_proof.json").read_text())


def test_a_right_merge_is_proven(make_run, merge, tmp_path, capsys):
    made = make_run()
    assert merge(made.path, tmp_path / "out") == 0
    proof = proof_of(tmp_path / "out")
    assert proof["status"] == "proven"
    assert (proof["precision"], proof["num_rows"]) == ("fp32", 6)
    assert 0 < proof["merged"]["mean_kl"] < 1e-3 < proof["effect"]["mean_kl"]
    assert proof["merged"]["max_kl"] >= proof["merged"]["mean_kl"]
    assert abs(proof["merged_loss"] - proof["adapter_loss"]) < 0.01
    assert 0.95 < proof["share_of_update_kept"] < 1.05
    assert proof["weights"]["num_layers"] == 14
    assert proof["weights"]["num_values"] > 10_000
    said = capsys.readouterr().out
    assert "same likeliest token" in said and "\nproven: mean KL" in said
    assert f"vllm serve {tmp_path / 'out'}" in said
    assert (
        "Compared with base and adapter on 6 held-out rows"
        in (tmp_path / "out/README.md").read_text()
    )


FAULT = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("share", [0.0, 1.02, 2.0])
@pytest.mark.parametrize("words", [[], ["peft.use_dora=true"]])
def test_one_layer_of_which_too_little_or_too_much_is_added(
    make_run, merge, tmp_path, monkeypatch, capsys, share, words
):
    made = make_run(*words)
    right = weights._sum

    def wrong(planned, rows):
        block = right(planned, rows)
        if planned.name != FAULT:
            return block
        without = weights.read_rows(planned.base, rows.start, rows.stop).float()
        return without + share * (block - without)

    monkeypatch.setattr(weights, "_sum", wrong)
    assert merge(made.path, tmp_path / "out", "--no-proof") == 1
    assert f"{FAULT}: " in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_setting_of_the_adapter_that_is_read_wrongly(
    make_run, merge, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(adapter_file, "_of_layer", lambda layer, common, pattern: common)
    made = make_run("peft.alpha_pattern={down_proj: 9}")
    assert merge(made.path, tmp_path / "out", "--no-proof") == 1
    assert "down_proj.weight: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", FAULT])
def test_bytes_that_change_on_their_way_to_the_disk(make_run, merge, tmp_path, monkeypatch, name):
    right = merging.check_weights

    def spoil(plan, layers, folder):
        tensor = tensor_files.read_folder(folder)[name]
        with tensor.file.open("r+b") as stream:
            stream.seek(tensor.start + tensor.num_bytes - 1)
            stream.write(b"\x13")
        return right(plan, layers, folder)

    monkeypatch.setattr(merging, "check_weights", spoil)
    made = make_run("peft.modules_to_save=[lm_head]")
    assert merge(made.path, tmp_path / "out", "--no-proof") == 1
    assert not list(tmp_path.glob("*out*"))


def test_what_is_no_weight_shows_in_the_answers(make_run, merge, tmp_path, monkeypatch, capsys):
    made = make_run()
    right = merging.write_files

    def wrong(config, *args, **options):
        rope = config["rope_parameters"] | {"rope_theta": 100.0}
        right({**config, "rope_parameters": rope}, *args, **options)

    monkeypatch.setattr(merging, "write_files", wrong)
    assert merge(made.path, tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()
    proof = proof_of(tmp_path / "out.unproven")
    assert proof["status"] == "not proven" and proof["merged"]["mean_kl"] > proof["kl_limit"]
    said = capsys.readouterr()
    assert "NOT PROVEN" in said.out and "out.unproven" in said.err
    # and again: what is kept is not overwritten
    assert merge(made.path, tmp_path / "out") == 2


def test_the_limit_follows_the_effect_between_two_bounds():
    limits = [kl_limit(effect, torch.float32) for effect in (0.0, 1e-3, 1.0)]
    assert limits == pytest.approx([1e-7, 1e-4, 5e-3])
    assert kl_limit(0.0, torch.bfloat16) > 5e-4


def test_an_update_that_the_base_s_type_cannot_hold(make_run, merge, tmp_path, capsys):
    made = make_run()
    file = made.path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= 1e-3
    save_file(tensors, file)
    assert merge(made.path, tmp_path / "out") == 1
    proof = proof_of(tmp_path / "out.unproven")
    # by the absolute limits alone all would be well: the adapter does so little
    assert proof["merged"]["mean_kl"] < 1e-3 and proof["merged"]["argmax_agreement"] > 0.99
    assert proof["share_of_update_kept"] < 0.9
    assert " is lost, its updates are smaller" in capsys.readouterr().out


def test_rows_of_a_file(make_run, merge, tmp_path, data_folder, capsys):
    made = make_run("data.path=/gone/train.jsonl")
    assert merge(made.path, tmp_path / "out") == 2
    assert "--proof-data" in capsys.readouterr().err
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "abc ", "completion": "ABC"}\n' * 3)
    words = ["--proof-data", str(file), "--proof-rows", "2", "--json"]
    assert merge(made.path, tmp_path / "out", *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["proof"]["num_rows"] == 2 and printed["proof"]["rows"] == str(file)
    assert printed["output"] == str(tmp_path / "out")


def test_a_run_in_4_bit_is_also_compared_with_what_it_trained(make_run, merge, tmp_path, capsys):
    made = make_run("model.quantization=nf4")
    assert merge(made.path, tmp_path / "out") == 0
    proof = proof_of(tmp_path / "out")
    assert proof["trained"]["mean_kl"] > 10 * proof["merged"]["mean_kl"]
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    said = capsys.readouterr()
    assert "added to the unquantized base" in said.err and "from 4 bit" in said.out


def test_a_model_too_large_for_this_machine(make_run, merge, tmp_path, monkeypatch, capsys):
    made = make_run()
    monkeypatch.setattr(proof_inputs, "available_host_bytes", lambda: 10**9)
    assert merge(made.path, tmp_path / "out") == 2
    assert "--no-proof" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_comparison_that_fails_keeps_what_was_written(make_run, merge, tmp_path, monkeypatch):
    made = make_run()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(merging, "prove", fail)
    assert merge(made.path, tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()
    proof = proof_of(tmp_path / "out.unproven")
    assert proof["status"] == "failed" and "no room" in proof["reason"]
    assert (tmp_path / "out.unproven/model.safetensors").is_file()


def test_more_positions_than_logits_are_kept_for(make_run, merge, tmp_path, monkeypatch):
    monkeypatch.setattr(proof_inputs, "_MAX_LOGITS_BYTES", 300 * 4 * 20)
    made = make_run()
    assert merge(made.path, tmp_path / "out") == 0
    proof = proof_of(tmp_path / "out")
    assert proof["num_supervised"] > 20 >= proof["num_positions"] > 10


def test_the_divergence_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    q = torch.tensor([[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    found = divergence(p.log() + 7, q.log() - 3)
    assert found.tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_of_a_job(tmp_path, monkeypatch, version):
    lines = {1: "5:cpu:/elsewhere\n4:memory:/slurm/job_7/step_0\n", 2: "0::/slurm/job_7/step_0\n"}
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    (tmp_path / "self").write_text(lines[version])
    root = tmp_path / "memory" if version == 1 else tmp_path
    job = root / "slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    limit, used, files = names[version]
    for group, allowed in ((job, 5_000_000), (job / "step_0", 9 * 10**18)):
        (group / limit).write_text(f"{allowed}\n")
        (group / used).write_text("3000000\n")
        (group / "memory.stat").write_text(f"cache 1\n{files} 1000000\n")
    monkeypatch.setattr(proof_inputs, "_PROC", tmp_path / "self")
    monkeypatch.setattr(proof_inputs, "_CGROUP", tmp_path)
    assert proof_inputs.available_host_bytes() == 3_000_000
