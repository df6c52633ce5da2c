"""The way from a configuration to packs; the cache; what is too long; answers to generate."""

import json
import multiprocessing
import shutil
import time

import numpy as np
import pytest

from lora_train.data.held_out import held_out_examples
from lora_train.data.prepared import prepare_data
from lora_train.errors import UserError


def same(one, other) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in (
            (one.train.tokens, other.train.tokens),
            (one.train.supervised, other.train.supervised),
            (one.train.offsets, other.train.offsets),
            (one.train_packs.members, other.train_packs.members),
            (one.train_packs.offsets, other.train_packs.offsets),
            (one.validation.tokens, other.validation.tokens),
        )
    )


def built(caplog) -> bool:
    """Tell whether data was made since the last call, rather than read from the cache."""
    found = any(record.message.startswith("prepared the data in") for record in caplog.records)
    caplog.clear()
    return found


def test_prepare(make_tokenizer, make_config, write_jsonl, chat_rows):
    tokenizer = make_tokenizer("chatml")
    config = make_config(write_jsonl(chat_rows(40)), seq_length=512)
    prepared = prepare_data(config, tokenizer, max_positions=None)
    report = prepared.report
    assert (report.format, len(prepared.train), len(prepared.validation)) == ("messages", 38, 2)
    assert prepared.train.tokens.dtype == np.int32 and prepared.train.offsets.dtype == np.int64
    tokens, supervised = prepared.train[0]
    assert tokenizer.decode(tokens[supervised]).startswith("the answer")
    assert report.train.num_supervised == prepared.train.supervised.sum()
    assert report.train.num_packs == len(prepared.train_packs)
    assert "train: 38 examples; " in report.text() and "% full" in report.text()
    with pytest.raises(IndexError):
        prepared.train[38]


def test_without_validation_and_without_packing(
    make_tokenizer, make_config, write_jsonl, chat_rows
):
    config = make_config(
        write_jsonl(chat_rows(10)), validation_size=0.0, packed_sequence=False, train_on="all"
    )
    prepared = prepare_data(config, make_tokenizer("chatml"), max_positions=None)
    assert prepared.validation is None and prepared.validation_packs is None
    assert [pack.tolist() for pack in prepared.train_packs] == [[i] for i in range(10)]
    assert prepared.train.supervised.all()
    assert "validation: none" in prepared.report.text()


def test_the_cache_is_used_and_knows_what_matters(
    make_tokenizer, make_config, write_jsonl, chat_rows, caplog
):
    caplog.set_level("INFO")
    tokenizer = make_tokenizer("chatml")
    file = write_jsonl(chat_rows(40))
    first = prepare_data(make_config(file), tokenizer, max_positions=None)
    assert built(caplog)
    # a copy elsewhere, and options that change no batch
    copy = file.with_name("copy.jsonl")
    shutil.copy(file, copy)
    again = prepare_data(make_config(copy, global_batch_size=3), tokenizer, max_positions=8192)
    assert not built(caplog) and same(first, again)
    assert again.report.text() == first.report.text().replace(str(file), str(copy))
    assert again.content_hash == first.content_hash

    others = [
        (make_config(file, seq_length=256), tokenizer),
        (make_config(file, train_on="all"), tokenizer),
        (make_config(file, seed=2), tokenizer),
        (make_config(file, packed_sequence=False), tokenizer),
        (make_config(file, validation_size=0.1), tokenizer),
        (make_config(file), make_tokenizer("chatml_with_marks")),
        (make_config(file), make_tokenizer("chatml", "metaspace")),
        (make_config(write_jsonl(chat_rows(41), "more.jsonl")), tokenizer),
    ]
    hashes = {first.content_hash}
    for config, other_tokenizer in others:
        hashes.add(prepare_data(config, other_tokenizer, max_positions=None).content_hash)
        assert built(caplog)
    assert len(hashes) == 1 + len(others)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "empty"])
def test_a_damaged_cache_is_made_anew(
    make_tokenizer, make_config, write_jsonl, chat_rows, own_cache, caplog, damage
):
    caplog.set_level("INFO")
    tokenizer = make_tokenizer("chatml")
    config = make_config(write_jsonl(chat_rows(40)))
    first = prepare_data(config, tokenizer, max_positions=None)
    kept = first.train.tokens.copy()
    assert built(caplog)
    [folder] = (own_cache / "prepared").iterdir()
    file = folder / "train.tokens.npy"
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flip":
        data[-5] ^= 1
    if damage == "cut":
        data = data[:-100]
    if damage != "remove":
        file.write_bytes(data)
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    second = prepare_data(config, tokenizer, max_positions=None)
    assert any("is damaged and made anew" in record.message for record in caplog.records)
    assert built(caplog)
    assert np.array_equal(second.train.tokens, kept)
    prepare_data(config, tokenizer, max_positions=None)
    assert not built(caplog)
    assert [left.name for left in (own_cache / "prepared").iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    make_tokenizer, make_config, write_jsonl, chat_rows, monkeypatch, caplog, tmp_path
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr("lora_train.data.prepared.cache_dir", lambda: blocked)
    config = make_config(write_jsonl(chat_rows(10)))
    prepared = prepare_data(config, make_tokenizer("chatml"), max_positions=None)
    assert len(prepared.train) == 9
    assert "going on from memory" in caplog.text


def _prepare_in_child(config, tokenizer, folder, barrier, results):
    import lora_train.data.prepared

    lora_train.data.prepared.cache_dir = lambda: folder
    barrier.wait()
    prepared = prepare_data(config, tokenizer, max_positions=None)
    results.put((prepared.content_hash, int(prepared.train.tokens.astype(np.int64).sum())))


def test_processes_at_once(make_tokenizer, make_config, write_jsonl, chat_rows, own_cache):
    config = make_config(write_jsonl(chat_rows(400)))
    tokenizer = make_tokenizer("chatml")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    children = [
        context.Process(
            target=_prepare_in_child, args=(config, tokenizer, own_cache, barrier, results)
        )
        for _ in range(4)
    ]
    for child in children:
        child.start()
    found = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(found) == 1
    [folder] = (own_cache / "prepared").iterdir()
    assert {(folder.name, int(np.load(folder / "train.tokens.npy").sum()))} == found


def rows_of_lengths(*words):
    return [{"input": "Context: " + "hello " * n, "output": "the answer is yes"} for n in words]


def test_overlong_auto_drops_a_few_and_refuses_many(
    make_tokenizer, make_config, write_jsonl, caplog
):
    tokenizer = make_tokenizer(None)
    options = {"seq_length": 64, "validation_size": 0.0}
    file = write_jsonl(rows_of_lengths(*[5] * 39, 100))
    prepared = prepare_data(make_config(file, **options), tokenizer, max_positions=None)
    assert len(prepared.train) == 39 and prepared.report.train.num_dropped == 1
    assert "39 examples, 1 left out as too long" in prepared.report.text()
    assert "1 of 40 examples of" in caplog.text

    file = write_jsonl(rows_of_lengths(*[5] * 37, 80, 90, 100))
    with pytest.raises(UserError) as caught:
        prepare_data(make_config(file, **options), tokenizer, max_positions=None)
    assert f"3 of 40 examples of {file} are longer than data.seq_length=64" in str(caught.value)
    assert "data.overlong=auto leaves out at most 5%" in caught.value.message
    assert caught.value.hint == "data.seq_length=128 takes all; data.overlong=drop leaves them out"
    config = make_config(file, overlong="drop", **options)
    assert len(prepare_data(config, tokenizer, max_positions=None).train) == 37

    # 1 of 2 held-out rows is no reason: the 38 others say how many are too long
    file = write_jsonl(rows_of_lengths(*[5] * 39, 100))
    held_out = [
        prepare_data(
            make_config(file, seq_length=64, seed=seed), tokenizer, max_positions=None
        ).report.validation
        for seed in range(40)
    ]
    assert {(one.num_examples, one.num_dropped) for one in held_out} == {(2, 0), (1, 1)}

    file = write_jsonl(rows_of_lengths(*[100] * 3))
    with pytest.raises(UserError, match="no example is left: 3 of 3"):
        prepare_data(make_config(file, overlong="drop", **options), tokenizer, max_positions=None)


def test_the_models_positions_limit_an_example_and_not_a_pack(
    make_tokenizer, make_config, write_jsonl
):
    file = write_jsonl(rows_of_lengths(*[5] * 10, 100))
    config = make_config(file, seq_length=256, validation_size=0.0)
    with pytest.raises(UserError) as caught:
        prepare_data(config, make_tokenizer(None), max_positions=64)
    assert "longer than the model's max_position_embeddings=64 tokens" in caught.value.message
    assert caught.value.hint == "data.overlong=drop leaves them out"
    file = write_jsonl(rows_of_lengths(*[5] * 10))
    config = make_config(file, seq_length=256, validation_size=0.0)
    prepared = prepare_data(config, make_tokenizer(None), max_positions=64)
    assert len(prepared.train_packs) == 1


def test_truncate_cuts_the_end_of_the_input_as_nemo_does(make_tokenizer, make_config, write_jsonl):
    tokenizer = make_tokenizer(None)
    rows = [*rows_of_lengths(5, 100), {"input": "hello", "output": "world " * 100}]
    options = {"seq_length": 40, "validation_size": 0.0, "overlong": "truncate"}
    config = make_config(write_jsonl(rows), add_bos=True, packed_sequence=False, **options)
    prepared = prepare_data(config, tokenizer, max_positions=None)
    report = prepared.report.train
    assert (report.num_examples, report.num_truncated, report.num_dropped) == (2, 1, 1)
    short, cut = prepared.train[0], prepared.train[1]
    assert len(cut[0]) == 40
    answer = tokenizer.decode(short[0][short[1]])
    assert tokenizer.decode(cut[0][cut[1]]) == answer == " the answer is yes</s>"
    whole = tokenizer.encode(rows[1]["input"].strip(), add_special_tokens=False)
    assert cut[0][~cut[1]].tolist() == [tokenizer.bos_token_id, *whole][: 40 - cut[1].sum()]
    # what is learned with train_on=all is everything that is left
    config = make_config(write_jsonl(rows), train_on="all", **options)
    prepared = prepare_data(config, tokenizer, max_positions=None)
    assert prepared.report.train.num_truncated == 1 and prepared.train.supervised.all()


def test_chats_cannot_be_truncated(make_tokenizer, make_config, write_jsonl, chat_rows):
    rows = chat_rows(30)
    rows[3]["messages"][0]["content"] = "hello " * 300
    config = make_config(
        write_jsonl(rows), seq_length=128, overlong="truncate", validation_size=0.0
    )
    with pytest.raises(UserError, match="cuts the input of input_output and prompt_completion"):
        prepare_data(config, make_tokenizer("chatml"), max_positions=None)


def test_rows_that_the_template_refuses_have_their_place(
    make_tokenizer, make_config, write_jsonl, chat_rows
):
    rows = chat_rows(5)
    rows[3]["messages"].insert(0, {"role": "system", "content": "be brief"})
    file = write_jsonl(rows)
    with pytest.raises(UserError) as caught:
        prepare_data(
            make_config(file, validation_size=0.0), make_tokenizer("inst"), max_positions=None
        )
    assert caught.value.message == (
        f"1 of 5 rows of {file} cannot be used:\n  {file}:4:1: the chat template refuses the"
        " conversation (roles: system, user, assistant): roles must alternate user/assistant"
    )


def test_notes_about_the_template(make_tokenizer, make_config, write_jsonl):
    turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    config = make_config(write_jsonl([{"messages": turn * 2}] * 4), validation_size=0.0)
    prepared = prepare_data(config, make_tokenizer("thinking"), max_positions=None)
    assert len(prepared.train) == 8 and prepared.report.train.num_rows == 4
    assert "note: 4 conversations became one sequence per answer" in prepared.report.text()


@pytest.mark.parametrize("template", ["chatml", None])
def test_prompts_for_generation(make_tokenizer, make_config, write_jsonl, chat_rows, template):
    tokenizer = make_tokenizer(template)
    if template:
        rows = chat_rows(20)
        for row in rows:
            row["messages"] = [*row["messages"], *row["messages"]]
        answers = [row["messages"][-1]["content"] for row in rows]
    else:
        rows = [{"input": f"question {i} ", "output": f" answer {i}"} for i in range(20)]
        answers = [row["output"] for row in rows]
    config = make_config(write_jsonl(rows), validation_size=0.25)
    found = held_out_examples(config, tokenizer, 3)
    assert len(found) == 3
    prepared = prepare_data(config, tokenizer, max_positions=None)
    assert len(held_out_examples(config, tokenizer, 100)) == len(prepared.validation) == 5
    for example, (tokens, _) in zip(found, prepared.validation, strict=False):
        prompt, answer = example.prompt_ids, example.reference
        assert answer in answers
        assert example.prompt.strip() in tokenizer.decode(prompt)
        assert tokens[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(tokens[len(prompt) :]).strip().startswith(answer.strip())
    assert held_out_examples(config, tokenizer, 0) == []
    config = make_config(write_jsonl(rows), validation_size=0.0)
    assert held_out_examples(config, tokenizer, 3) == []


def test_the_embedded_data(smollm2, make_config, monkeypatch):
    from lora_train.quickstart import DATA_REFERENCE, embedded_path

    try:
        folder = embedded_path(DATA_REFERENCE)
    except Exception as error:
        pytest.skip(f"no embedded data: {error}")
    config = make_config(DATA_REFERENCE)
    prepared = prepare_data(config, smollm2, max_positions=8192)
    assert prepared.report.train.fill_rate >= 0.98
    assert (
        prepared.report.train.num_examples
        == len((folder / "train.jsonl").read_text().split("\n")) - 1
    )
    first = json.loads((folder / "train.jsonl").open().readline())["messages"]
    tokens, supervised = prepared.train[0]
    assert smollm2.decode(tokens) == smollm2.apply_chat_template(first, tokenize=False)
    assert smollm2.decode(tokens[supervised]) == first[-1]["content"] + "<|im_end|>"


def test_preparing_takes_little_more_than_the_tokenizer(smollm2, make_config, tmp_path):
    """At most twice the own time of the tokenizer is the aim; 4 leaves room for a busy machine."""
    rng = np.random.default_rng(0)
    words = ["the", "model", "answers", "question", "about", "data", "and", "what", "they", "hold"]

    def text(n):
        return " ".join(rng.choice(words, n)) + f" {rng.integers(1e6)}"

    conversations = [
        [{"role": "user", "content": text(90)}, {"role": "assistant", "content": text(30)}]
        for _ in range(2000)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    rendered = smollm2.apply_chat_template(conversations, tokenize=False)
    ratios = []
    for seed in range(3):
        start = time.perf_counter()
        smollm2(rendered)
        alone = time.perf_counter() - start
        start = time.perf_counter()
        prepared = prepare_data(make_config(file, seed=seed), smollm2, max_positions=None)
        ratios.append((time.perf_counter() - start) / alone)
    assert prepared.report.train.num_tokens > 200_000
    assert min(ratios) < 4, ratios
