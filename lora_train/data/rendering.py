"""From an example to its text, with the characters that are to be learned.

Chats are rendered by the tokenizer's own template. Where an answer starts and ends is found by
rendering the conversation up to it, so a template needs no {% generation %} marks; most have none.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_train.data.formats import Chat, Example, InputOutput, Instruction, PromptCompletion
from lora_train.data.messages import RowError
from lora_train.errors import UserError

# the prompts of Stanford Alpaca, for tokenizers without a chat template
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one training sequence."""

    text: str
    """All of it."""
    spans: tuple[tuple[int, int], ...]
    """Characters to be learned, as (start, end) in rising order."""
    is_chat: bool = False
    """Whether a chat template wrote it, with its BOS and end of turn; raw text gets BOS and EOS."""
    is_split: bool = False
    """Whether prompt and answer are tokenized one by one in any case, as NeMo does."""


@dataclass
class ChatRenderer:
    """Renders chats in batches; counts what the report should say."""

    tokenizer: Any
    """A transformers tokenizer with a chat template."""
    learn_everything: bool = False
    """data.train_on=all: one span over the whole text."""
    num_split_by_turn: int = field(default=0, init=False)
    """Chats that became a sequence per answer, as earlier turns are rendered differently later."""
    unlearned_prompt: str = field(default="", init=False)
    """What the generation prompt ends in although the template's answers do not start with it."""

    def render(self, chats: Sequence[Chat]) -> list[list[Rendered] | RowError]:
        """Render chats.

        Args:
            chats: checked conversations.

        Returns:
            For each chat its sequences, mostly one; or why the template refuses it.
        """
        requests: list[tuple[Chat, int, bool]] = []
        bounds = [0]
        for chat in chats:
            requests.append((chat, len(chat.messages), False))
            if not self.learn_everything:
                requests += [(chat, turn, True) for turn in chat.supervised]
            bounds.append(len(requests))
        texts = self._texts(requests)
        begun = [texts[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
        if self.learn_everything:
            return [
                whole
                if isinstance(whole, RowError)
                else [Rendered(whole, ((0, len(whole)),), is_chat=True)]
                for [whole] in begun
            ]

        # the ends of the answers, where they do not follow from what is there
        done: list[list[Rendered] | RowError | None] = [
            _plain_sequence(chat, texts) for chat, texts in zip(chats, begun, strict=True)
        ]
        rest = [index for index, sequence in enumerate(done) if sequence is None]
        ends = iter(
            self._texts([(chats[i], turn + 1, False) for i in rest for turn in chats[i].supervised])
        )
        for index in rest:
            more = [next(ends) for _ in chats[index].supervised]
            done[index] = self._sequences(chats[index], [*begun[index], *more])
        return [sequence for sequence in done if sequence is not None]

    def prompt(self, chat: Chat, turn: int) -> str:
        """Return the text before an answer, as inference would give it to the model.

        Args:
            chat: a checked conversation.
            turn: index of the message that is the answer.

        Returns:
            The rendered text, which ends where the answer begins.

        Raises:
            RowError: the template refuses the conversation.
        """
        [text] = self.prompts([(chat, turn)])
        if isinstance(text, RowError):
            raise text
        return text

    def prompts(self, requests: Sequence[tuple[Chat, int]]) -> list[str | RowError]:
        """As `prompt`, for many: for each chat and turn the text, or why it is refused."""
        return self._texts([(chat, turn, True) for chat, turn in requests])

    def _sequences(self, chat: Chat, texts: Sequence[str | RowError]) -> list[Rendered] | RowError:
        """Turn the whole, the prompts and the ends of a chat's answers into sequences."""
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(texts):
            return next(text for text in texts if isinstance(text, RowError))
        whole = strings[0]
        prompts = strings[1 : 1 + len(chat.supervised)]
        ends = strings[1 + len(prompts) :]
        if all(map(whole.startswith, prompts)) and all(map(whole.startswith, ends)):
            spans = [
                (len(prompt), max(len(prompt), len(end.rstrip())))
                for prompt, end in zip(prompts, ends, strict=True)
            ]
            return [Rendered(whole, tuple(spans), is_chat=True)]
        # such as Qwen3, which drops the thinking of earlier turns: `whole` would show what no model
        # sees at inference, so each answer gets the conversation as it is when it is written
        if len(prompts) > 1:
            self.num_split_by_turn += 1
        sequences = []
        for turn, prompt, end in zip(chat.supervised, prompts, ends, strict=True):
            start = self._answer_start(chat, turn, prompt, end)
            if isinstance(start, RowError):
                return start
            sequences.append(Rendered(end, ((start, len(end.rstrip())),), is_chat=True))
        return sequences

    def _answer_start(self, chat: Chat, turn: int, prompt: str, end: str) -> int | RowError:
        """Find the answer where the text does not start with the prompt of inference.

        Some templates prompt for thinking that their rendered answers do not have.
        """
        if end.startswith(prompt):
            return len(prompt)
        before = self._texts([(chat, turn, False)])[0]
        if isinstance(before, RowError):
            return before
        common = len(os.path.commonprefix([prompt, end]))
        if not end.startswith(before) or common < len(before):
            return RowError(
                "the chat template renders the turns before this answer differently once the answer"
                " follows, so where it starts cannot be told",
                path=("messages", turn),
            )
        # an answer may start like the rest of the prompt by chance: go back to the last whole mark
        start = common
        shared = end[len(before) : common]
        marks = [mark for mark in ("\n", *self.tokenizer.get_added_vocab()) if mark in shared]
        if marks:
            start = len(before) + max(shared.rfind(mark) + len(mark) for mark in marks)
        self.unlearned_prompt = prompt[start:]
        return start

    def _texts(self, requests: Sequence[tuple[Chat, int, bool]]) -> list[str | RowError]:
        """Render (chat, number of its messages, whether to prompt for an answer) in few calls."""
        groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
        for index, (chat, _, prompted) in enumerate(requests):
            options = ""
            if chat.tools or chat.template_kwargs:
                options = json.dumps([chat.tools, chat.template_kwargs], sort_keys=True)
            groups[prompted, options].append(index)
        texts: list[str | RowError] = [""] * len(requests)
        for (prompted, _), indexes in groups.items():
            first = requests[indexes[0]][0]
            options_of_group = {
                "tools": first.tools,
                "add_generation_prompt": prompted,
                **first.template_kwargs,
            }
            conversations = [requests[i][0].messages[: requests[i][1]] for i in indexes]
            for index, text in zip(
                indexes, self._apply(conversations, options_of_group), strict=True
            ):
                texts[index] = text
        return texts

    def _apply(
        self, conversations: list[list[dict[str, Any]]], options: dict[str, Any]
    ) -> list[str | RowError]:
        try:
            # one call for all: a call each costs five times as much
            return list(
                self.tokenizer.apply_chat_template(conversations, tokenize=False, **options)
            )
        except Exception as error:
            # the template is a program of the model's maker and may raise anything
            if len(conversations) == 1:
                return [_refusal(conversations[0], error)]
            return [self._apply([one], options)[0] for one in conversations]


def _plain_sequence(chat: Chat, texts: Sequence[str | RowError]) -> list[Rendered] | None:
    """Find the answers of a chat whose template treats every turn alike, from few renderings.

    Each answer must stand word for word behind its prompt, and be closed as the last one is. Then
    the conversation need not be rendered up to the end of each answer. (Three turns prepare in 1.6
    instead of 2.1 times the tokenizer's own time, SmolLM2 on two busy cores.)

    Args:
        chat: a checked conversation.
        texts: the whole, and the prompts of its answers.

    Returns:
        One sequence; None if its answers do not stand like this, or say more than their content
        (reasoning, tool calls), which a template may render for the last turn only.
    """
    whole, *prompts = texts
    answers = [chat.messages[turn] for turn in chat.supervised]
    if (
        not isinstance(whole, str)
        or chat.supervised[-1] != len(chat.messages) - 1
        or any(len(answer) > 2 for answer in answers)
    ):
        return None
    closing = None
    spans = []
    for prompt, answer in zip(reversed(prompts), reversed(answers), strict=True):
        if not isinstance(prompt, str) or not whole.startswith(prompt):
            return None
        after = len(prompt) + len(answer["content"])
        if closing is None:
            closing = whole[after:].rstrip()
        if not whole.startswith(answer["content"] + closing, len(prompt)) or not closing:
            return None
        spans.append((len(prompt), after + len(closing)))
    return [Rendered(whole, tuple(reversed(spans)), is_chat=True)]


def _refusal(conversation: list[dict[str, Any]], error: Exception) -> RowError:
    roles = ", ".join(message["role"] for message in conversation[:6]) or "none"
    more = ", ..." if len(conversation) > 6 else ""
    return RowError(f"the chat template refuses the conversation (roles: {roles}{more}): {error}")


def render_examples(
    examples: Sequence[Example], chats: ChatRenderer
) -> list[list[Rendered] | RowError]:
    """Render examples of any form.

    Args:
        examples: checked examples.
        chats: renders those that are chats.

    Returns:
        For each example its sequences; or why the chat template refuses it.

    Raises:
        UserError: chats, and the tokenizer has no chat template.
    """
    has_template = chats.tokenizer.chat_template is not None
    as_chats = {
        index: chat
        for index, example in enumerate(examples)
        if (chat := as_chat(example, has_template)) is not None
    }
    if as_chats and not has_template:
        raise UserError(
            f"the examples are chats, but the tokenizer of {chats.tokenizer.name_or_path} has no"
            " chat template",
            hint="use the model's -Instruct variant, or model.chat_template=FILE",
        )
    done = dict(zip(as_chats, chats.render(list(as_chats.values())), strict=True))
    return [
        done[index] if index in done else [_raw(example)] for index, example in enumerate(examples)
    ]


def as_chat(example: Example, has_template: bool) -> Chat | None:
    """Return the chat that an example is rendered as, or None if it is raw text."""
    if isinstance(example, Chat):
        return example
    if not (isinstance(example, Instruction) and has_template):
        return None
    request = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
    messages = [
        {"role": "user", "content": request},
        {"role": "assistant", "content": example.output},
    ]
    return Chat(messages, (1,))


def _raw(example: Example) -> Rendered:
    prompt, answer = raw_parts(example)
    text = prompt + answer
    return Rendered(text, ((len(prompt), len(text)),), is_split=isinstance(example, InputOutput))


def raw_parts(example: Example) -> tuple[str, str]:
    """Return the prompt and the answer of an example that is no chat."""
    if isinstance(example, PromptCompletion):
        return example.prompt, example.completion
    if isinstance(example, InputOutput):
        # NeMo's prompt template "{input} {output}", which strips both
        return example.input.strip(" "), f" {example.output.strip(' ')}"
    if isinstance(example, Instruction):
        template = _ALPACA_WITH_INPUT if example.input else _ALPACA
        return template.format(instruction=example.instruction, input=example.input), example.output
    assert not isinstance(example, Chat)
    return "", example.text
