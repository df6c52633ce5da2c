"""What the adapter calls its base, what its card says, and how vLLM is told to serve it."""

import json
import shlex

import pytest

from lora_train.cli import main
from lora_train.merge.base_name import portable_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names_that_mean_the_same_everywhere(tmp_path):
    assert portable_name("org/model", "main", COMMIT) == portable_name("org/model", COMMIT)
    snapshot = tmp_path / f"hub/models--meta-llama--Llama-3.1-8B/snapshots/{COMMIT}"
    snapshot.mkdir(parents=True)
    found = portable_name(str(snapshot))
    assert (found.name, found.revision) == ("meta-llama/Llama-3.1-8B", COMMIT)
    (tmp_path / "link").symlink_to(snapshot)
    assert portable_name(str(tmp_path / "link")) == found
    old = portable_name("gpt2", None, COMMIT)
    assert (old.name, old.revision, old.warning) == ("gpt2", COMMIT, None)
    embedded = portable_name("embedded:smollm2-135m-instruct")
    assert (embedded.name, embedded.warning) == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)


def test_a_local_folder_is_named_by_its_config_or_its_own_name(tmp_path):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    unknown = portable_name(str(folder))
    assert unknown.name == "my-llama" and "--base-name" in unknown.warning
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/llama"}))
    assert portable_name(str(folder)) == unknown
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-8B"}))
    assert (portable_name(str(folder)).name, portable_name(str(folder)).warning) == (
        "Qwen/Qwen3-8B",
        None,
    )


def test_the_base_name_is_written_afterwards(make_run, tmp_path, capsys):
    made = make_run()
    settings = made.path / "adapter/adapter_config.json"
    assert json.loads(settings.read_text())["base_model_name_or_path"] == made.base.name
    mode = (made.path / "adapter/adapter_model.safetensors").stat().st_mode
    assert mode == settings.stat().st_mode  # as readable as the rest
    assert main(["merge", str(made.path), "--base-name", "nonsense"]) == 2
    assert main(["merge", str(made.path), "--base-name", "org/model"]) == 0
    assert json.loads(settings.read_text())["base_model_name_or_path"] == "org/model"
    card = (made.path / "adapter/README.md").read_text()
    assert "base_model: org/model\n" in card and "rank 4, alpha 8" in card
    assert str(made.base.parent) not in settings.read_text() + card
    assert str(tmp_path) not in settings.read_text() + card
    # a changed name changes no weights: PEFT loads it as before
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.base)
    again = PeftModel.from_pretrained(base, made.path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == "org/model"


@pytest.mark.parametrize(
    ("words", "obstacle"),
    [
        (["peft.use_dora=true"], "DoRA"),
        (["peft.modules_to_save=[lm_head]"], "modules_to_save"),
        (["peft.alpha_pattern={q_proj: 64}"], "scalings of their own (2, 16)"),
        (["peft.target_modules=[q_proj,lm_head]"], "an adapter on lm_head"),
    ],
)
def test_what_vllm_cannot_serve(make_run, merge, tmp_path, capsys, words, obstacle):
    assert merge(make_run(*words).path, tmp_path / "out", "--no-proof", "--json") == 0
    serving = json.loads(capsys.readouterr().out)["serving"]
    assert obstacle in serving["adapter_obstacles"][0]
    assert serving["adapter_command"] is None
    assert shlex.split(serving["merged_command"])[:3] == ["vllm", "serve", str(tmp_path / "out")]


@pytest.mark.parametrize(("rank", "flag"), [(4, "8"), (16, None), (20, "32"), (300, "320")])
def test_the_line_that_serves_the_adapter(make_run, merge, tmp_path, capsys, rank, flag):
    made = make_run(f"peft.dim={rank}")
    assert merge(made.path, tmp_path / "out", "--no-proof", "--json") == 0
    line = shlex.split(json.loads(capsys.readouterr().out)["serving"]["adapter_command"])
    assert line[:4] == ["vllm", "serve", str(made.base), "--enable-lora"]
    assert f"tiny={made.path / 'adapter'}" in line
    assert (line[line.index("--max-lora-rank") + 1] if "--max-lora-rank" in line else None) == flag


def test_a_rank_that_vllm_does_not_take(make_run, merge, tmp_path, capsys):
    assert merge(make_run("peft.dim=600").path, tmp_path / "out", "--no-proof") == 0
    assert "rank 600 is above" in capsys.readouterr().out


def test_an_end_of_turn_that_servers_do_not_know(make_run, merge, tmp_path, capsys):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    made = make_run(f"model.chat_template={template}")
    assert merge(made.path, tmp_path / "out", "--no-proof") == 0
    assert '"stop": ["<|endoftext|>"]' in capsys.readouterr().out


def test_a_trained_adapter_brings_its_card(base_folder, data_folder, tmp_path):
    words = [
        f"model.path={base_folder()}", f"data.path={data_folder}", "data.seq_length=128",
        "peft.dim=4", "trainer.max_steps=2", "trainer.precision=fp32", "log.name=tiny",
        f"log.log_dir={tmp_path / 'runs'}", "log.trackers=[]", "data.global_batch_size=2",
    ]  # fmt: skip
    assert main(words) == 0
    adapter = tmp_path / "runs/tiny/adapter"
    card = (adapter / "README.md").read_text()
    assert "| steps | 2 of 2 sequences up to 128 tokens (packed) |" in card
    assert "training loss" in card and "held-out loss" in card and "More Information" not in card
    assert (
        "/"
        not in json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    # finished, it is only shown; and what it recorded is what the merge compares with
    assert main(words) == 0
    assert main(["merge", str(tmp_path / "runs/tiny"), "--output", str(tmp_path / "out")]) == 0
    proof = json.loads((tmp_path / "out/merge_proof.json").read_text())
    assert proof["status"] == "proven" and "SHA-256" in proof["base"]["checked_by"]
