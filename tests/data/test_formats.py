"""Every form of a row, and what is said about rows that have none."""

import pytest

from lora_train.data.formats import (
    Chat,
    InputOutput,
    Instruction,
    PromptCompletion,
    Text,
    answer_text,
    detect_format,
    normalize,
)
from lora_train.data.messages import RowError
from lora_train.errors import UserError

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"messages": [USER, ANSWER], "id": 3}, "messages", Chat([USER, ANSWER], (1,))),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hello"},
                    {"from": "gpt", "value": "yes"},
                ]
            },
            "sharegpt",
            Chat([USER, ANSWER], (1,)),
        ),
        ({"conversations": [USER, ANSWER]}, "sharegpt", Chat([USER, ANSWER], (1,))),
        (
            {"instruction": "do", "input": "", "output": "done", "text": "all"},
            "alpaca",
            Instruction("do", "", "done"),
        ),
        ({"instruction": "do", "output": "done"}, "alpaca", Instruction("do", "", "done")),
        (
            {"prompt": "a", "completion": " b"},
            "prompt_completion",
            PromptCompletion("a", " b"),
        ),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            "prompt_completion",
            Chat([USER, ANSWER, USER, ANSWER], (3,)),
        ),
        ({"input": "a", "output": "b"}, "input_output", InputOutput("a", "b")),
        ({"text": "all of it"}, "text", Text("all of it")),
    ],
)
def test_each_form_is_told_by_its_keys(row, name, expected):
    assert detect_format(row, "f:1") == name
    assert normalize(row, name) == expected


def test_a_named_format_wins_over_the_keys():
    row = {"messages": [USER, ANSWER], "text": "raw"}
    assert normalize(row, "text") == Text("raw")


def test_unknown_keys_are_listed_with_the_known_forms_and_the_nearest_name():
    with pytest.raises(UserError) as caught:
        detect_format(["mesages", "id"], "train.jsonl:1")
    assert str(caught.value).startswith(
        "train.jsonl:1: unknown form of a row; keys found: 'mesages', 'id'; known forms:\n"
        '  messages: {"messages": [{"role": "user",'
    )
    assert "did you mean 'mesages' for 'messages'?" in caught.value.hint


def test_weight_zero_and_the_prompt_of_a_conversation_are_not_learned():
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    chat = normalize(row, "messages")
    assert chat.supervised == (3,)
    assert all("weight" not in message for message in chat.messages)


def test_tool_calls_need_no_content_and_nulls_of_tables_go_away():
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {
        "messages": [
            {**USER, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_calls": None},
            {**ANSWER, "tool_calls": None},
        ],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    chat = normalize(row, "messages", drop_nulls=True)
    assert chat.messages[0] == USER
    assert chat.messages[1]["content"] == ""
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert chat.supervised == (1, 3)
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]
    kept = normalize(row, "messages").messages[1]["tool_calls"][0]["function"]["arguments"]
    assert kept == {"a": 1, "b": None}, "a null written in a JSON file is meant"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    assert normalize(row, "messages").messages[0] == USER


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([USER], 'expected an object like {"messages": [{"role": "user", "content": ...}'),
        ({"id": 1}, "no key 'messages'; keys found: 'id'; expected {\"messages\""),
        ({"messages": []}, "messages: empty list of messages"),
        ({"messages": 3}, "messages: expected a list of messages; found the number 3"),
        ({"messages": ["hi"]}, 'messages[0]: expected a message like {"role"'),
        ({"messages": [{"content": "x"}]}, "messages[0]: no key \"role\"; keys found: 'content'"),
        ({"messages": [{"role": "user"}, ANSWER]}, 'messages[0]: no key "content"'),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            "messages[1].role: unknown role; expected system, developer, user, assistant, tool,"
            " function (did you mean 'assistant'?); found the text \"asistant\"",
        ),
        ({"messages": [{"role": "human", "content": "x"}]}, "(did you mean 'user'?)"),
        ({"messages": [USER]}, "messages: no assistant turn; expected at least one answer"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "messages[1].content: empty answer"),
        (
            {"messages": [USER, {**ANSWER, "content": 7}]},
            "messages[1].content: expected text; found",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "expected weight 0 or 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            'messages[0].content[0].type: only text can be learned; found the text "image_url"',
        ),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "not valid UTF-8: \\ud800"),
    ],
)
def test_bad_conversations(row, message):
    with pytest.raises(RowError) as caught:
        normalize(row, "messages")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        ({"input": "a"}, "input_output", "no key 'output'; keys found: 'input'"),
        ({"input": "a", "outptu": "b"}, "input_output", "did you mean 'output' by 'outptu'?"),
        (
            {"input": "a", "output": 42},
            "input_output",
            "output: expected text; found the number 42",
        ),
        ({"input": "a", "output": None}, "input_output", "no key 'output'"),
        ({"input": "a", "output": " "}, "input_output", "output: empty answer"),
        ({"instruction": "", "output": "x"}, "alpaca", "instruction: empty instruction"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt_completion", "must both be text"),
        ({"prompt": [USER], "completion": [USER]}, "prompt_completion", "no assistant turn"),
        ({"text": ""}, "text", "text: empty text"),
    ],
)
def test_bad_rows_of_other_forms(row, name, message):
    with pytest.raises(RowError) as caught:
        normalize(row, name)
    assert message in str(caught.value)


def test_the_reference_answer():
    assert answer_text(Chat([USER, ANSWER, USER, {**ANSWER, "content": "no"}], (1, 3))) == "no"
    assert answer_text(InputOutput("a", "b")) == answer_text(PromptCompletion("a", "b")) == "b"
