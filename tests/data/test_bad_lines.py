"""Every bad line is named with file, line and column, many at once."""

import json
import os

import pytest

from lora_train.config import DataConfig
from lora_train.data.examples import read_examples
from lora_train.data.sources import find_sources
from lora_train.errors import UserError


def refusal(path, format_name="auto") -> UserError:
    with pytest.raises(UserError) as caught:
        read_examples(find_sources(DataConfig(path=str(path)), 0).train, format_name)
    return caught.value


USER = '{"role": "user", "content": "a"}'
FORM = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}'


def test_the_exact_message(write_jsonl):
    file = write_jsonl(
        [
            f'{{"messages": [{USER}, {{"role": "assistant", "content": "b"}}]}}',
            f'{{"messages": [{USER} {{"role": "assistant", "content": "b"}}]}}',
            f'{{"messages": [{USER}, {{"role": "asistant", "content": "b"}}]}}',
            f'{{"messages": [{USER}, {{"role": "assistant", "content": ""}}]}}',
            "",
            '{"messages": []}',
            '{"id": 7}',
            '["not", "an object"]',
            f'{{"messages": [{USER}]',
            '{"messages": "hello"}',
            f'{{"messages": [{USER}]}}',
        ]
    )
    error = refusal(file)
    assert error.exit_status == 2
    assert error.message == "\n  ".join(
        [
            f"9 of 10 rows of {file} cannot be used:",
            f'{file}:2:48: invalid JSON: expecting \',\' delimiter; found {{"role": "assistant"',
            f"{file}:3:58: messages[1].role: unknown role; expected system, developer, user,"
            " assistant, tool, function (did you mean 'assistant'?); found the text \"asistant\"",
            f"{file}:4:82: messages[1].content: empty answer",
            f"{file}:6:14: messages: empty list of messages",
            f"{file}:7:1: no key 'messages'; keys found: 'id'; expected {FORM}",
            f"{file}:8:1: expected an object like {FORM}; found a list",
            f"{file}:9:49: invalid JSON: expecting ',' delimiter; found the end of the line",
            f"{file}:10:14: messages: invalid JSON inside of the text: Expecting value: line 1"
            " column 1 (char 0)",
            f"{file}:11:14: messages: no assistant turn; expected at least one answer to learn",
        ]
    )
    assert error.hint == "mend or delete these lines; nothing is skipped silently"


def test_one_bad_line_of_ten_thousand(tmp_path):
    row = json.dumps({"input": "a question", "output": "an answer"})
    lines = [row] * 10_000
    lines[7_122] = '{"input": "a question", "output": 3}'
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(lines))
    assert refusal(file).message == (
        f"1 of 10000 rows of {file} cannot be used:\n"
        f"  {file}:7123:35: output: expected text; found the number 3"
    )


def test_at_most_twenty_are_shown(write_jsonl):
    good = {"input": "a", "output": "b"}
    file = write_jsonl([good] + [{"input": "a", "output": ""}] * 57 + ["{"] * 3)
    lines = refusal(file).message.splitlines()
    assert lines[0].startswith("60 of 61 rows")
    assert len(lines) == 22 and lines[-1] == "  and 40 more"
    assert lines[1] == f"  {file}:2:26: output: empty answer"
    assert lines[20] == f"  {file}:21:26: output: empty answer"


def test_invalid_utf8_has_its_column(tmp_path):
    file = tmp_path / "train.jsonl"
    good = b'{"input": "a", "output": "b"}\n'
    file.write_bytes(good + b'{"input": "caf\xe9", "output": "b"}\n' + b"\xff\xfe\n" + good)
    lines = refusal(file).message.splitlines()
    assert lines[1:] == [
        f"  {file}:2:11: input: not valid UTF-8: byte 0xe9",
        f"  {file}:3:1: not valid UTF-8: byte 0xff",
    ]


def test_places_in_a_json_document(tmp_path):
    file = tmp_path / "rows.json"
    rows = [{"input": "a", "output": "b"}, {"input": "a", "output": ["b"]}]
    file.write_text(json.dumps(rows, indent=2))
    assert f"{file}:8:15: output: expected text; found a list" in refusal(file).message
    file.write_text(json.dumps({"data": rows}, indent=2))
    assert f"{file}:9:17: output: expected text; found a list" in refusal(file).message
    file.write_text('[\n  {"input": "a",\n   "output" "b"}\n]')
    assert f"{file}:3:13: invalid JSON: expecting ':' delimiter" in refusal(file).message


def test_places_in_csv(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('input,output\n"two\nlines",b\na\nc,\nd,e,f\n')
    assert refusal(file).message.splitlines()[1:] == [
        f"  {file}:4: expected 2 fields as in the header, found 1",
        f"  {file}:5: output: empty answer",
        f"  {file}:6: expected 2 fields as in the header, found 3",
    ]
    file.write_text('input,output\na,"b"c\n')
    assert f"{file}:2: invalid CSV: ',' expected after" in refusal(file).message


def test_rows_of_mixed_forms_are_bad_lines(write_jsonl):
    file = write_jsonl([{"input": "a", "output": "b"}, {"prompt": "a", "completion": "b"}])
    assert (
        f"{file}:2:1: no key 'input' or 'output'; keys found: 'prompt', 'completion'; expected"
        ' {"input": ..., "output": ...}' in refusal(file).message
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write_jsonl):
    file = write_jsonl([{"text": "a"}])
    file.chmod(0)
    assert refusal(file).message == f"cannot read {file}: Permission denied"
