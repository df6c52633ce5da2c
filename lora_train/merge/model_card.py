"""README.md of an adapter and of a merged model: what it is, how it was made, how to load it.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_train import __version__
from lora_train.config import Config
from lora_train.merge.base_name import EMBEDDED_NAME, HUB_NAME, BaseName
from lora_train.metrics import read_metrics
from lora_train.quickstart import MODEL_REFERENCE


def adapter_card(config: Config, base: BaseName, run_directory: Path) -> str:
    """Return the README of an adapter.

    Args:
        config: the run.
        base: how the adapter names its base model.
        run_directory: its metrics.jsonl is read.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    name = config.log.name or run_directory.name
    revision = "" if base.revision is None else f', revision="{base.revision}"'
    return "\n".join(
        [
            *_front_matter(base, "peft", "lora"),
            f"# {name}",
            "",
            f"A LoRA adapter (PEFT) for {_link(base)}.",
            "",
            *_how_it_was_made(config, base, run_directory),
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = "{base.name}"',
            f'model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype="bfloat16")',
            'model = PeftModel.from_pretrained(model, "FOLDER_OR_NAME_OF_THIS_ADAPTER")',
            f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
            "```",
            "",
            *_template_note(config),
            "The licence of the base model applies.",
            "",
        ]
    )


def merged_card(
    config: Config,
    base: BaseName,
    run_directory: Path,
    *,
    dtypes: str,
    proof: Mapping[str, Any],
) -> str:
    """Return the README of a merged model.

    Args:
        config: the run.
        base: how the adapter names its base model.
        run_directory: its metrics.jsonl is read.
        dtypes: the weights' type.
        proof: content of merge_proof.json.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    name = config.log.name or run_directory.name
    if proof["status"] == "proven":
        measured = proof["merged"]
        proven = (
            f"Compared with base and adapter on {proof['num_rows']} held-out rows "
            f"({proof['num_positions']} tokens): mean KL divergence {measured['mean_kl']:.1e}, "
            f"{measured['argmax_agreement']:.2%} of the likeliest tokens the same "
            "(merge_proof.json)."
        )
    else:
        proven = f"Not compared with base and adapter ({proof['reason']})."
    return "\n".join(
        [
            *_front_matter(base, "transformers", "lora", "merged"),
            f"# {name}",
            "",
            f"{_link(base)} with a LoRA adapter merged into its weights: added in fp32, rounded "
            f"once to {dtypes}.",
            proven,
            "",
            *_how_it_was_made(config, base, run_directory),
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "FOLDER_OR_NAME_OF_THIS_MODEL"',
            'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "```",
            "",
            "The licence of the base model applies.",
            "",
        ]
    )


def write_adapter_card(adapter: Path, config: Config, run_directory: Path) -> None:
    """Write the README of an adapter that a run made.

    Args:
        adapter: folder in PEFT's format; its adapter_config.json names the base.
        config: the run.
        run_directory: its metrics.jsonl is read.

    Raises:
        OSError: it cannot be written.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = BaseName(settings["base_model_name_or_path"], settings.get("revision"))
    text = adapter_card(config, base, run_directory)
    (adapter / "README.md").write_text(text, encoding="utf-8")


def _front_matter(base: BaseName, library: str, *tags: str) -> list[str]:
    # the hub refuses a card whose base_model is no hub name
    named = [f"base_model: {base.name}"] if HUB_NAME.fullmatch(base.name) else []
    return [
        "---",
        *named,
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in (*tags, "lora-train")),
        "---",
        "",
    ]


def _link(base: BaseName) -> str:
    if not HUB_NAME.fullmatch(base.name):
        return f"`{base.name}`"
    at = "" if base.revision is None else f" at `{base.revision}`"
    return f"[{base.name}](https://huggingface.co/{base.name}){at}"


def _how_it_was_made(config: Config, base: BaseName, run_directory: Path) -> list[str]:
    peft, optim, data = config.peft, config.optim, config.data
    rows = read_metrics(run_directory / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    steps = max((row["step"] for row in rows if "loss" in row), default=0)
    targets = peft.target_modules
    features = [
        *(["rsLoRA"] if peft.use_rslora else []),
        *(["DoRA"] if peft.use_dora else []),
        *([f"{peft.init} start"] if peft.init != "default" else []),
        *([f"dropout {peft.dropout:g}"] if peft.dropout else []),
        *([f"{', '.join(peft.modules_to_save)} in full"] if peft.modules_to_save else []),
    ]
    lines = [
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_link(base)} |",
        f"| data | `{_without_folder(data.path)}`, loss on "
        f"{'answers only' if data.train_on == 'answers' else 'all tokens'} |",
        f"| adapter | rank {peft.dim}, alpha {peft.alpha:g} on "
        f"{targets if isinstance(targets, str) else ', '.join(targets)}"
        f"{''.join(f'; {each}' for each in features)} |",
        f"| steps | {steps} of {data.global_batch_size} sequences up to {data.seq_length} tokens"
        f"{' (packed)' if data.packed_sequence else ''} |",
        f"| optimizer | {optim.name}, learning rate {optim.lr:g}, {optim.lr_scheduler.name} |",
    ]
    if losses:
        lines.append(
            f"| training loss | {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end |"
        )
    if len(validation) > 1:
        lines.append(f"| held-out loss | {validation[0]:.4f} before, {validation[-1]:.4f} after |")
    lines += [f"| made with | lora-train {__version__} |", ""]
    if config.model.path == MODEL_REFERENCE:
        lines += [
            f"Trained on a copy of {EMBEDDED_NAME} whose weights went through a 4-bit file (Q4_1): "
            "on the original the answers differ a little.",
            "",
        ]
    if config.model.quantization is not None:
        lines += [
            f"Trained beside the base in 4 bit ({config.model.quantization}): on the unquantized "
            "base the answers differ a little.",
            "",
        ]
    return lines


def _template_note(config: Config) -> list[str]:
    if config.model.chat_template is None:
        return []
    return ["Trained with another chat template than the base's own, which lies beside it.", ""]


def _without_folder(path: str) -> str:
    """Return a hub name as it is, of a path its last part: where it lay says nothing to others."""
    is_path = path.startswith(("/", ".", "~")) or Path(path).exists()
    return Path(path).name if is_path else path
