"""Whether the adapter and the merged model can be served, and the lines that do it.

The limits are vLLM's, read in its source (vllm/config/lora.py, vllm/lora/peft_helper.py and
vllm/lora/lora_weights.py, of 2025 and 2026). Imports no torch.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from lora_train.merge.adapter_file import AdapterFile
from lora_train.merge.folder import TokenFacts

# vllm/config/lora.py, MaxLoRARanks, without the 1 that older ones lack; its default is 16
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_MAX_RANK = 16
_EMBEDDING_LAYERS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")


@dataclass(frozen=True)
class Serving:
    """What a server of the adapter, or of the merged model, must know."""

    adapter_obstacles: tuple[str, ...]
    """Why vLLM refuses the adapter, or would serve it wrongly."""
    warnings: tuple[str, ...]
    """What is odd, but may be meant."""
    adapter_command: str | None
    """Serves base and adapter; None: it cannot be."""
    merged_command: str
    """Serves the merged model."""


def check_serving(
    adapter: AdapterFile,
    *,
    name: str,
    base: Path,
    is_tied: bool,
    vocabulary: int | None,
    tokens: TokenFacts,
    merged: Path,
) -> Serving:
    """Say how adapter and merged model are served with vLLM.

    Args:
        adapter: the adapter.
        name: what the server is to call it.
        base: folder of the base: by its name a server without network may not find it, nor the
            same revision with one.
        is_tied: whether the base's output layer is its embedding.
        vocabulary: rows of the base's embedding, if known.
        tokens: of its tokenizer.
        merged: folder of the merged model.

    Returns:
        The findings, and the lines to paste.
    """
    obstacles = _obstacles(adapter, is_tied)
    rank = max(adapter.ranks, default=0)
    warnings = []
    if vocabulary is not None and tokens.num_tokens > vocabulary:
        warnings.append(
            f"the tokenizer knows {tokens.num_tokens} tokens, the embedding has {vocabulary} "
            "rows: a server fails on the tokens beyond"
        )
    if not tokens.has_chat_template:
        warnings.append(
            "the tokenizer has no chat template: /v1/chat/completions answers with an error; "
            "use /v1/completions, or give `vllm serve --chat-template FILE`"
        )
    if tokens.unknown_stop is not None:
        name_of_stop = tokens.unknown_stop[0]
        warnings.append(
            f"the chat template ends a turn with {name_of_stop}, at which the base does not stop: "
            "the merged model's generation_config.json names it too; with the adapter give "
            f'"stop": ["{name_of_stop}"] in each request'
        )
    serve = ["vllm", "serve", str(base.absolute()), "--enable-lora"]
    serve += ["--lora-modules", f"{name}={adapter.folder.absolute()}"]
    allowed = next((each for each in _MAX_RANKS if each >= rank), None)
    if allowed is not None and allowed != _DEFAULT_MAX_RANK:
        serve += ["--max-lora-rank", str(allowed)]
    serve_merged = ["vllm", "serve", str(merged), "--served-model-name", name]
    return Serving(
        tuple(obstacles),
        tuple(warnings),
        None if obstacles else shlex.join(serve),
        shlex.join(serve_merged),
    )


def _obstacles(adapter: AdapterFile, is_tied: bool) -> list[str]:
    settings, found = adapter.settings, []
    rank = max(adapter.ranks, default=0)
    if rank > _MAX_RANKS[-1]:
        found.append(f"rank {rank} is above vLLM's highest --max-lora-rank, {_MAX_RANKS[-1]}")
    if settings.get("modules_to_save") or adapter.replaced:
        names = ", ".join(settings.get("modules_to_save") or sorted(adapter.replaced))
        found.append(f"{names} trained in full (modules_to_save): vLLM refuses such an adapter")
    if settings.get("use_dora"):
        found.append("DoRA: vLLM refuses it")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        found.append("biases in the adapter: vLLM does not support them")
    common = settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    if any(not math.isclose(scaling, common) for scaling in adapter.scalings):
        # PEFTHelper reads r and lora_alpha alone: rank_pattern and alpha_pattern are dropped
        shown = ", ".join(f"{scaling:g}" for scaling in adapter.scalings)
        found.append(
            f"layers with scalings of their own ({shown}): vLLM takes alpha and r of the whole "
            "adapter for every layer, and answers wrongly without a word"
        )
    embedding_layers = sorted(
        {layer.rpartition(".")[2] for layer in adapter.updates} & set(_EMBEDDING_LAYERS)
    )
    if embedding_layers:
        tied = " (here one matrix with the embedding)" if is_tied else ""
        found.append(
            f"an adapter on {', '.join(embedding_layers)}{tied}: vLLM serves it for few "
            "architectures"
        )
    return found
