"""The audit refuses labels that would train the wrong thing, and shows what is learned."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from lora_train.data.audit import audit
from lora_train.data.prepared import prepare_data
from lora_train.data.tokenized_set import TokenizedSet
from lora_train.errors import UserError


@pytest.fixture
def prepared_chats(make_tokenizer, make_config, write_jsonl, chat_rows):
    def make(template="chatml", **data):
        tokenizer = make_tokenizer(template)
        config = make_config(write_jsonl(chat_rows(20)), **data)
        return prepare_data(config, tokenizer, max_positions=None), tokenizer, config

    return make


def with_train(prepared, **arrays):
    train = {
        key: np.array(arrays.get(key, getattr(prepared.train, key)))
        for key in ("tokens", "supervised", "offsets")
    }
    return dataclasses.replace(prepared, train=TokenizedSet(**train))


def test_it_shows_one_example_with_marks_or_colours(prepared_chats):
    found = audit(*prepared_chats())
    text = found.text()
    assert (
        "<|im_start|>user\nWhat is 0? <|im_end|>\n<|im_start|>assistant\n"
        ">>>the answer 0<|im_end|><<<\n" in text
    )
    assert "19 training examples, " in text and "% of them learned" in text
    plain, coloured = io.StringIO(), io.StringIO()
    Console(file=plain, width=200).print(found)
    assert ">>>the answer 0<|im_end|><<<" in plain.getvalue()
    Console(file=coloured, force_terminal=True, color_system="standard", width=200).print(found)
    assert "\x1b[1;32mthe answer 0<|im_end|>" in coloured.getvalue()
    assert ">>>" not in coloured.getvalue()
    assert found.warnings == ()


@pytest.mark.parametrize("template", ["chatml", "llama3", "inst", "thinking", None])
@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_good_data_passes(
    prepared_chats, make_tokenizer, make_config, write_jsonl, template, train_on
):
    """The tokenizers of these tests all have pad == eos."""
    if template:
        assert audit(*prepared_chats(template, train_on=train_on)).warnings == ()
        return
    tokenizer = make_tokenizer(None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    config = make_config(write_jsonl([{"input": "a", "output": "b"}] * 5), train_on=train_on)
    audit(prepare_data(config, tokenizer, max_positions=None), tokenizer, config)


def test_nothing_to_learn_is_refused(prepared_chats):
    prepared, tokenizer, config = prepared_chats()
    nothing = np.zeros_like(prepared.train.supervised)
    with pytest.raises(
        UserError, match="19 of 19 training examples have no token to learn; the first"
    ):
        audit(with_train(prepared, supervised=nothing), tokenizer, config)
    some = np.array(prepared.train.supervised)
    for index in (3, 7):
        some[prepared.train.offsets[index] : prepared.train.offsets[index + 1]] = False
    # a first token has nothing before it that could predict it
    some[prepared.train.offsets[3]] = True
    with pytest.raises(
        UserError, match="2 of 19 training examples have no token to learn; .* example 3"
    ):
        audit(with_train(prepared, supervised=some), tokenizer, config)


def test_an_end_of_turn_that_is_not_learned_is_refused(prepared_chats):
    prepared, tokenizer, config = prepared_chats()
    ends = prepared.train.supervised & (prepared.train.tokens == tokenizer.eos_token_id)
    masked = prepared.train.supervised & ~ends
    with pytest.raises(UserError) as caught:
        audit(with_train(prepared, supervised=masked), tokenizer, config)
    assert "19 of 19 answers in the training examples end without an end-of-turn token" in str(
        caught.value
    )
    assert "example 0 ends in " in caught.value.message and "answer 0'" in caught.value.message
    assert "model.chat_template=FILE" in caught.value.hint


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_a_template_without_an_end_of_turn_is_refused(
    make_tokenizer, make_config, write_jsonl, chat_rows, train_on
):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    config = make_config(write_jsonl(chat_rows(20)), train_on=train_on)
    prepared = prepare_data(config, tokenizer, max_positions=None)
    with pytest.raises(UserError, match="19 of 19 answers .* end without an end-of-turn token"):
        audit(prepared, tokenizer, config)


def test_an_answer_that_was_cut_away_is_refused(prepared_chats):
    prepared, tokenizer, config = prepared_chats()
    lengths = prepared.train.lengths.copy()
    lengths[4] -= 4
    keep = np.concatenate(
        [np.arange(o, o + n) for o, n in zip(prepared.train.offsets, lengths, strict=False)]
    )
    cut = with_train(
        prepared,
        tokens=prepared.train.tokens[keep],
        supervised=prepared.train.supervised[keep],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
    with pytest.raises(UserError, match="1 of 19 answers .* example 4 ends in"):
        audit(cut, tokenizer, config)


def test_a_doubled_bos_is_refused(make_tokenizer, make_config, write_jsonl, chat_rows):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    config = make_config(write_jsonl(chat_rows(20)))
    prepared = prepare_data(config, tokenizer, max_positions=None)
    with pytest.raises(UserError, match="19 of 19 training examples begin with '<s>' twice"):
        audit(prepared, tokenizer, config)


def test_ends_at_which_generation_does_not_stop_are_warned_of(prepared_chats, tmp_path):
    prepared, tokenizer, config = prepared_chats("llama3")
    tokenizer.eos_token = "</s>"
    found = audit(prepared, tokenizer, config)
    assert found.warnings[0].startswith(
        "training answers end in <|eot_id|> (19), but generation stops at </s>"
    )
    assert "warning: training answers end in" in found.text()
    # Llama-3's generation config lists both
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<|eot_id|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer.name_or_path = str(tmp_path)
    assert audit(prepared, tokenizer, config).warnings == ()


def test_long_examples_are_shortened(make_tokenizer, make_config, write_jsonl):
    rows = [{"prompt": "hello " * 1500, "completion": " yes"}] * 3
    tokenizer = make_tokenizer(None)
    config = make_config(write_jsonl(rows), seq_length=8192, validation_size=0.0)
    text = audit(prepare_data(config, tokenizer, max_positions=None), tokenizer, config).text()
    assert "[... 7,800 characters ...]" in text and len(text) < 2000
    assert text.count(">>> yes</s><<<") == 1
