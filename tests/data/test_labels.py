"""What is learned: exactly the answers and their ends, whatever the template and the tokenizer."""

import json

import numpy as np
import pytest

from lora_train.data.formats import (
    Chat,
    InputOutput,
    Instruction,
    PromptCompletion,
    Text,
    normalize,
)
from lora_train.data.messages import RowError
from lora_train.data.rendering import ChatRenderer, render_examples
from lora_train.data.tokenizing import ExampleTokenizer
from lora_train.errors import UserError

CONVERSATION = [
    {"role": "system", "content": "Split the address into JSON"},
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "yes no"},
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris.\nyes"},
]


def tokenized(tokenizer, examples, *, learn_everything=False, add_bos=None):
    """Return (tokens, supervised) of all sequences, and the renderer."""
    chats = ChatRenderer(tokenizer, learn_everything=learn_everything)
    rendered = [one for item in render_examples(examples, chats) for one in item]
    done = ExampleTokenizer(tokenizer, add_bos=add_bos).tokenize(rendered)
    return [(one.tokens, one.supervised) for one in done], chats


def learned_texts(tokenizer, tokens, supervised):
    """Return the text of every run of learned tokens."""
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(supervised)) + 1)
    return [tokenizer.decode(tokens[run]) for run in runs if supervised[run[0]]]


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace"])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:3], CONVERSATION[:4]])
def test_labels_agree_with_generation_marks(make_tokenizer, messages, kind):
    tokenizer = make_tokenizer("chatml_with_marks", kind)
    truth = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(truth["assistant_masks"]) > 2
    chat = normalize({"messages": messages}, "messages")
    [(tokens, supervised)], _ = tokenized(tokenizer, [chat])
    assert tokens.tolist() == truth["input_ids"]
    assert supervised.tolist() == [bool(mark) for mark in truth["assistant_masks"]]
    # the same template without the marks gives the same labels
    [(tokens, supervised)], _ = tokenized(make_tokenizer("chatml", kind), [chat])
    assert tokens.tolist() == truth["input_ids"]
    assert supervised.tolist() == [bool(mark) for mark in truth["assistant_masks"]]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("chatml", CONVERSATION, ["yes no<|im_end|>", "Paris.\nyes<|im_end|>"]),
        ("llama3", CONVERSATION, ["yes no<|eot_id|>", "Paris.\nyes<|eot_id|>"]),
        ("inst", CONVERSATION[1:], ["yes no </s>", "Paris.\nyes </s>"]),
    ],
)
def test_every_turn_with_its_end_and_no_blank_after_it(
    make_tokenizer, template, messages, expected, kind
):
    tokenizer = make_tokenizer(template, kind)
    [(tokens, supervised)], chats = tokenized(
        tokenizer, [normalize({"messages": messages}, "messages")]
    )
    assert [text.strip(" ") for text in learned_texts(tokenizer, tokens, supervised)] == expected
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    if template != "inst" or kind == "bytes":
        # on metaspace a token may lie over "] yes", which is then tokenized apart
        assert tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if template != "chatml":
        assert tokens[0] == tokenizer.bos_token_id
        assert (tokens == tokenizer.bos_token_id).sum() == 1
    assert chats.num_split_by_turn == 0


def test_a_template_that_drops_thinking_makes_one_sequence_per_answer(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    messages = [dict(message) for message in CONVERSATION[1:]]
    messages[1]["reasoning_content"] = "one two"
    messages[3]["reasoning_content"] = "three"
    sequences, chats = tokenized(tokenizer, [normalize({"messages": messages}, "messages")])
    assert chats.num_split_by_turn == 1
    assert [learned_texts(tokenizer, *sequence) for sequence in sequences] == [
        ["<think>\none two\n</think>\n\nyes no<|im_end|>"],
        ["<think>\nthree\n</think>\n\nParis.\nyes<|im_end|>"],
    ]
    for (tokens, supervised), turn in zip(sequences, (1, 3), strict=True):
        seen = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)
        assert tokens[~supervised][: len(seen["input_ids"])].tolist() == seen["input_ids"]
    # one answer needs no second sequence, and with train_on=all nothing is said twice
    _, chats = tokenized(tokenizer, [normalize({"messages": messages[:2]}, "messages")])
    assert chats.num_split_by_turn == 0
    everything, _ = tokenized(
        tokenizer, [normalize({"messages": messages}, "messages")], learn_everything=True
    )
    assert len(everything) == 1 and everything[0][1].all()


def test_a_prompt_that_the_rendered_answer_lacks_is_reported(make_tokenizer):
    tokenizer = make_tokenizer("prompts_for_thinking")
    chat = normalize({"messages": CONVERSATION[1:3]}, "messages")
    [(tokens, supervised)], chats = tokenized(tokenizer, [chat])
    assert learned_texts(tokenizer, tokens, supervised) == ["yes no<|im_end|>"]
    assert chats.unlearned_prompt == "<think>\n"
    # the answer begins as the missing part does
    chat = normalize(
        {"messages": [CONVERSATION[1], {"role": "assistant", "content": "<b>yes"}]}, "messages"
    )
    [(tokens, supervised)], _ = tokenized(tokenizer, [chat])
    assert learned_texts(tokenizer, tokens, supervised) == ["<b>yes<|im_end|>"]


def test_tool_calls_are_learned_and_tool_answers_are_not(make_tokenizer):
    tokenizer = make_tokenizer("tools")
    call = {"function": {"name": "capital", "arguments": {"of": "France"}}}
    row = {
        "tools": [{"type": "function", "function": {"name": "capital"}}],
        "messages": [
            {"role": "user", "content": "What is the capital?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "Paris"},
            {"role": "assistant", "content": "Paris."},
        ],
    }
    [(tokens, supervised)], _ = tokenized(tokenizer, [normalize(row, "messages")])
    assert learned_texts(tokenizer, tokens, supervised) == [
        f"<call>{json.dumps(call['function'])}</call><|im_end|>",
        "Paris.<|im_end|>",
    ]
    assert tokenizer.decode(tokens).startswith('<|im_start|>system\n[{"type": "function"')


def test_turns_with_weight_zero_are_context_only(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["weight"] = 0
    [(tokens, supervised)], _ = tokenized(
        tokenizer, [normalize({"messages": messages}, "messages")]
    )
    assert learned_texts(tokenizer, tokens, supervised) == ["Paris.\nyes<|im_end|>"]
    messages[4]["weight"], messages[2]["weight"] = 0, 1
    [(tokens, supervised)], _ = tokenized(
        tokenizer, [normalize({"messages": messages}, "messages")]
    )
    assert learned_texts(tokenizer, tokens, supervised) == ["yes no<|im_end|>"]


def test_a_refusing_template_says_which_roles(make_tokenizer):
    [refused, fine] = render_examples(
        [
            normalize({"messages": CONVERSATION}, "messages"),
            normalize({"messages": CONVERSATION[1:]}, "messages"),
        ],
        ChatRenderer(make_tokenizer("inst")),
    )
    assert isinstance(refused, RowError)
    assert str(refused) == (
        "the chat template refuses the conversation (roles: system, user, assistant, user, "
        "assistant): roles must alternate user/assistant"
    )
    assert len(fine) == 1


def test_chats_without_a_template_are_refused_with_the_line_that_mends_it(make_tokenizer):
    chat = normalize({"messages": CONVERSATION}, "messages")
    with pytest.raises(UserError) as caught:
        tokenized(make_tokenizer(None), [chat])
    assert "made-bytes-None has no chat template" in caught.value.message
    assert "model.chat_template=FILE" in caught.value.hint


def test_alpaca_is_a_chat_or_stanfords_text(make_tokenizer):
    example = Instruction("Split", "hello", "world")
    tokenizer = make_tokenizer("chatml")
    [(tokens, supervised)], _ = tokenized(tokenizer, [example])
    assert tokenizer.decode(tokens) == (
        "<|im_start|>user\nSplit\n\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
    )
    tokenizer = make_tokenizer(None)
    sequences, _ = tokenized(tokenizer, [example, Instruction("Split", "", "world")])
    texts = [tokenizer.decode(tokens) for tokens, _ in sequences]
    assert texts[0].endswith(
        "completes the request.\n\n### Instruction:\nSplit\n\n### Input:\nhello\n\n"
        "### Response:world</s>"
    )
    assert texts[1].startswith(
        "Below is an instruction that describes a task. Write a response that appropriately"
    )
    assert all(learned_texts(tokenizer, *one) == ["world</s>"] for one in sequences)


def nemo_tokens(tokenizer, source: str, target: str) -> tuple[list[int], int]:
    """Tokenize as NeMo's GPTSFTDataset does: prompt_template "{input} {output}", add_eos."""

    def text_to_ids(text):
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))

    pieces = ("x y", "x", "y")
    x_y, x, y = (tokenizer.tokenize(piece) for piece in pieces)
    space_sensitive = x_y != x + y
    answer = target.strip(" ")
    context = text_to_ids(source.strip(" "))
    label = text_to_ids(f" {answer}" if space_sensitive else answer)
    return [*context, *label, tokenizer.eos_token_id], len(context)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Context: the model Question: what? Answer:", "the model"),
        (" the answer: ", " 42 "),
        ("Answer:\n", "\nyes"),
        ("", "yes"),
    ],
)
def test_input_output_gives_nemos_tokens(make_tokenizer, kind, source, target):
    tokenizer = make_tokenizer(None, kind)
    expected, answer_start = nemo_tokens(tokenizer, source, target)
    [(tokens, supervised)], _ = tokenized(tokenizer, [InputOutput(source, target)], add_bos=False)
    assert tokens.tolist() == expected
    assert supervised.tolist() == [place >= answer_start for place in range(len(expected))]


def test_thinking_that_only_an_earlier_answer_has_is_learned_too(make_tokenizer):
    tokenizer = make_tokenizer("thinking_if_any")
    messages = [dict(message) for message in CONVERSATION[1:]]
    messages[1]["reasoning_content"] = "one two"
    sequences, chats = tokenized(tokenizer, [normalize({"messages": messages}, "messages")])
    assert chats.num_split_by_turn == 1
    assert [learned_texts(tokenizer, *sequence) for sequence in sequences] == [
        ["<think>\none two\n</think>\n\nyes no<|im_end|>"],
        ["Paris.\nyes<|im_end|>"],
    ]


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Answer:", " the model"),
        ("Answer: ", "the model"),  # "the" wants the blank: a token would lie on the boundary
        ("the an", "swer is yes"),
        ("hello\n", "\nworld"),
        ("hello ", " world"),
        ("hello world", "\U0001f600 yes"),
        ("", "hello"),
    ],
)
def test_the_prompt_is_tokenized_as_inference_does(make_tokenizer, kind, prompt, completion):
    tokenizer = make_tokenizer(None, kind)
    example = PromptCompletion(prompt, completion)
    [(tokens, supervised)], _ = tokenized(tokenizer, [example], add_bos=False)
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    assert tokens[~supervised].tolist() == alone
    assert supervised[len(alone) :].all()
    assert tokens[-1] == tokenizer.eos_token_id
    # nothing is added to the text and nothing lost, wherever it is cut
    assert tokenizer.decode(tokens[:-1]) == prompt + completion


def test_bos_and_eos_of_raw_text_stand_once(make_tokenizer):
    tokenizer = make_tokenizer(None)
    for example in (Text("hello"), Text("<s>hello</s>"), PromptCompletion("<s>hel", "lo</s>")):
        [(tokens, supervised)], _ = tokenized(tokenizer, [example], add_bos=True)
        assert tokenizer.decode(tokens) == "<s>hello</s>"
        assert supervised[-1]
    [(tokens, _)], _ = tokenized(tokenizer, [Text("hello")], add_bos=None)
    assert tokenizer.decode(tokens) == "hello</s>", "this tokenizer adds no BOS of its own"


def test_raw_text_needs_an_eos(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenized(tokenizer, [Text("hello")])
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="data.add_bos=true"):
        tokenized(tokenizer, [Text("hello")], add_bos=True)


def test_padding_left_on_by_others_changes_nothing(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    chats = [
        Chat(CONVERSATION[1:3], (1,)),
        Chat([CONVERSATION[1], {"role": "assistant", "content": "no " * 40}], (1,)),
    ]
    expected, _ = tokenized(tokenizer, chats, add_bos=False)
    tokenizer(["a", "hello world"], padding=True, truncation=True, max_length=5)
    found, _ = tokenized(tokenizer, chats, add_bos=False)
    assert [tokens.tolist() for tokens, _ in found] == [tokens.tolist() for tokens, _ in expected]


def test_the_real_tokenizer(smollm2):
    [(tokens, supervised)], _ = tokenized(
        smollm2, [normalize({"messages": CONVERSATION}, "messages")]
    )
    rendered = smollm2.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokens.tolist() == smollm2(rendered, add_special_tokens=False)["input_ids"]
    assert learned_texts(smollm2, tokens, supervised) == [
        "yes no<|im_end|>",
        "Paris.\nyes<|im_end|>",
    ]
