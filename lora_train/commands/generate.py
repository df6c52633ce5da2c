"""`lora-train generate`: talk to a trained model, or answer a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train import exit_status
from lora_train.commands.generate_inputs import Source, find_source, read_prompts, with_system

_DESCRIPTION = """\
Talk to a trained model. RUN is a run directory that `lora-train` made: its config.yaml names the
base model, and its adapter (or, while it trains, the newest complete checkpoint's) is loaded on it.
Without --prompt and --input this is a chat on the terminal: /reset forgets what was said, /quit or
Ctrl-D ends it.

  lora-train generate runs/quickstart --prompt "12 Elm St, Dover, DE 19901" --which both
      the answers of the base model and of the trained one, side by side
  lora-train generate runs/quickstart --input addresses.txt > answers.jsonl
      one prompt a line in, {"prompt": ..., "answer": ...} a line out
"""

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Speaker:
    """A loaded model with the options of the command line."""

    model: Any
    tokenizer: Any
    options: argparse.Namespace

    def variants(self) -> list[str]:
        """Return which of base and adapter are to answer, in this order."""
        return ["base", "adapter"] if self.options.which == "both" else [self.options.which]

    def as_variant(self, name: str) -> AbstractContextManager[Any]:
        """Return a context in which the model answers as base or adapter."""
        has_adapter = hasattr(self.model, "disable_adapter")
        return self.model.disable_adapter() if name == "base" and has_adapter else nullcontext()

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens that come before the answer, as in training."""
        if self.tokenizer.chat_template is None:
            # a base model continues a text; it knows no turns
            return list(self.tokenizer("\n".join(str(m["content"]) for m in messages)).input_ids)
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train generate`.

    Returns:
        The exit status.

    Raises:
        UserError: an argument names nothing that can be used.
    """
    options = _parse(argv)
    source = find_source(options)
    prompts = None
    if options.prompt is not None:
        prompts = [with_system([{"role": "user", "content": options.prompt}], source.system)]
    elif options.input is not None:
        prompts = [with_system(each, source.system) for each in read_prompts(options.input)]
    if source.system is not None and options.system is None:
        print(f"system message of the run: {source.system}", file=sys.stderr)
    speaker = _load(source, options)
    if prompts is None:
        return _chat(speaker, source.system)
    if options.prompt is not None:
        for name in speaker.variants():
            if len(speaker.variants()) > 1:
                print(f"--- {name}")
            _stream(speaker, prompts[0], name)
        return exit_status.OK
    return _answer_file(speaker, prompts)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-train generate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--model", metavar="PATH", help="base model, instead of RUN")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter, instead of RUN's; PEFT's format"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this, then stop")
    parser.add_argument(
        "--input", type=Path, metavar="FILE",
        help=".txt: one prompt a line; .jsonl: rows with prompt, input or messages",
    )  # fmt: skip
    parser.add_argument(
        "--which", choices=["adapter", "base", "both"], default=None,
        help="who answers (default: adapter where there is one)",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the run's)")
    parser.add_argument(
        "--max-new-tokens", type=_positive_int, default=256, metavar="N",
        help="longest answer, in tokens (default 256)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=_non_negative, default=0.0, metavar="T",
        help="0: the likeliest token each time (default); higher: more varied",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P",
        help="draw from the likeliest tokens that make up this share (default 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default 1234)")
    options = parser.parse_args(argv)
    if (options.run is None) == (options.model is None):
        parser.error("give a run directory, or --model with --adapter")
    if options.prompt is not None and options.input is not None:
        parser.error("give --prompt or --input, not both")
    if options.input is not None and options.temperature > 0:
        parser.error("--input answers in batches, greedily: leave --temperature out")
    return options


def _load(source: Source, options: argparse.Namespace) -> Speaker:
    import torch
    from transformers.utils import logging as transformers_logging

    from lora_train.adapter import load_adapter
    from lora_train.device import select_device, select_precision, set_cpu_threads
    from lora_train.model import load_base_model, load_tokenizer

    transformers_logging.disable_progress_bar()
    set_cpu_threads()
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(source.model)
    device = select_device()
    precision = select_precision(source.precision, device)  # type: ignore[arg-type]
    print(f"loading {source.model.path} ({precision.reason})", file=sys.stderr)
    model: Any = load_base_model(source.model, precision.dtype, device)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter)
    return Speaker(model, tokenizer, options)


def _stream(speaker: Speaker, messages: list[dict[str, Any]], variant: str) -> str:
    """Write an answer to stdout as it comes, and return it."""
    from transformers import TextStreamer

    from lora_train.generation import stream_answer

    streamer = TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = speaker.options
    with speaker.as_variant(variant):
        return stream_answer(
            speaker.model,
            speaker.tokenizer,
            speaker.prompt_ids(messages),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            streamer=streamer,
        )


def _chat(speaker: Speaker, system: str | None) -> int:
    """Talk on the terminal until Ctrl-D; each of base and adapter remembers its own answers."""
    variants = speaker.variants()
    print("/reset forgets, /quit or Ctrl-D ends", file=sys.stderr)
    history: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for line in _typed_lines():
        if line == "/quit":
            break
        if line == "/reset":
            history = {name: [] for name in variants}
            continue
        for name in variants:
            if len(variants) > 1:
                print(f"--- {name}")
            turns = history[name]
            # without a template there are no turns to remember
            if speaker.tokenizer.chat_template is None:
                turns.clear()
            turns.append({"role": "user", "content": line})
            answer = _stream(speaker, with_system(turns, system), name)
            turns.append({"role": "assistant", "content": answer})
    return exit_status.OK


def _typed_lines() -> Iterator[str]:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def _answer_file(speaker: Speaker, prompts: list[list[dict[str, Any]]]) -> int:
    from lora_train.generation import generate_answers

    names = speaker.variants()
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[start : start + _BATCH_SIZE]
        ids = [speaker.prompt_ids(messages) for messages in batch]
        columns = []
        for name in names:
            with speaker.as_variant(name):
                columns.append(
                    generate_answers(
                        speaker.model,
                        speaker.tokenizer,
                        ids,
                        max_new_tokens=speaker.options.max_new_tokens,
                        batch_size=_BATCH_SIZE,
                    )
                )
        keys = names if len(names) > 1 else ["answer"]
        for messages, *answers in zip(batch, *columns, strict=True):
            row = {"prompt": messages[-1]["content"], **dict(zip(keys, answers, strict=True))}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        print(f"answered {start + len(batch)} of {len(prompts)}", file=sys.stderr)
    return exit_status.OK


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
