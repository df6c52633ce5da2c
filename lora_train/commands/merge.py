"""`lora-train merge`: the adapter added into its base model, and a proof that nothing was lost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lora_train import exit_status
from lora_train.errors import UserError
from lora_train.merge.base_model import quantized_target
from lora_train.merge.base_name import HUB_NAME
from lora_train.merge.gguf_job import GGUF_KINDS
from lora_train.merge.job import MergeJob, name_base, prepare_job
from lora_train.merge.serving import Serving
from lora_train.recorded_run import read_run

if TYPE_CHECKING:
    from lora_train.merge.merging import MergeResult

_ROWS = (
    ("mean KL", "mean_kl", "{:.1e}"),
    ("highest KL", "max_kl", "{:.1e}"),
    ("largest logit difference", "max_logit_difference", "{:.3f}"),
    ("same likeliest token", "argmax_agreement", "{:.2%}"),
)

_DESCRIPTION = """\
Add a run's adapter into its base model and write the sum as an ordinary Hugging Face folder, which
transformers, vLLM and others load without PEFT: W + (alpha / r) B A in fp32, rounded once to the
base's own type, into the unquantized base also where the run trained beside it in 4 bit.

Some rows of every weight are read back and held against PEFT's own merge in fp64: where one is not
the nearest number, nothing is kept. Then base + adapter and the merged model answer the same
held-out rows. Where their distributions differ by more than that rounding explains, the command
ends with 1 and the folder is named DIR.unproven. The figures are kept in DIR/merge_proof.json.

  lora-train merge runs/mine --output models/mine
      merge, compare on 64 rows of the run's validation split, say how both are served
  lora-train merge runs/mine --output models/mine --gguf q8_0
      also models/mine/mine-q8_0.gguf, for llama.cpp
  lora-train merge runs/mine --output models/mine --base /scratch/Llama-3.1-8B
      another copy of the base; it is refused if it is not the model of the run
  lora-train merge runs/mine --base-name meta-llama/Llama-3.1-8B
      only let the adapter name its base so, before it is given to others
"""


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train merge`.

    Returns:
        The exit status: failed where the merge is not proven, or the GGUF file could not be made.

    Raises:
        UserError: the run, the base or a word of the command line cannot be used.
        RunError: the merged model cannot be written.
    """
    options = _parse(argv)
    _log_to_stderr()
    recorded = read_run(options.run)
    if options.output is None:
        name_base(recorded, options.base_name)
        return exit_status.OK
    job = prepare_job(
        recorded,
        options.output,
        base=options.base,
        base_name=options.base_name,
        proof_data=options.proof_data,
        proof_rows=0 if options.no_proof else options.proof_rows,
        gguf_kind=options.gguf,
    )
    if options.base_name is not None:
        name_base(recorded, options.base_name)
    from lora_train.merge.merging import merge  # imports torch, only now

    return _show(job, merge(job), as_json=options.json)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-train merge",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the merged model; absent or empty"
    )
    parser.add_argument(
        "--base", metavar="PATH",
        help="another copy of the base, a folder or hub name (default: what the run names)",
    )  # fmt: skip
    parser.add_argument(
        "--base-name", metavar="ORG/NAME",
        help="hub name that the adapter and the model cards give the base",
    )  # fmt: skip
    parser.add_argument(
        "--no-proof",
        action="store_true",
        help="do not compare the answers; merge_proof.json says so",
    )
    parser.add_argument(
        "--proof-data", type=Path, metavar="FILE",
        help="rows to compare on (default: the run's validation split)",
    )  # fmt: skip
    parser.add_argument(
        "--proof-rows", type=int, default=64, metavar="N", help="at most so many (default 64)"
    )
    parser.add_argument(
        "--gguf", nargs="?", const="bf16", metavar="TYPE",
        help="also write a GGUF file: bf16 (default), f16, f32 or q8_0; with llama.cpp's converter "
        "where LLAMA_CPP_DIR or the PATH has it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the results as JSON on stdout")
    # refused with the reason, where argparse would only not know it
    parser.add_argument("--quantize", nargs="?", const="4 bit", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quantize is not None:
        raise quantized_target(f"--quantize {options.quantize}")
    if options.output is None and options.base_name is None:
        parser.error("--output DIR says where the merged model goes")
    if options.base_name is not None and HUB_NAME.fullmatch(options.base_name) is None:
        raise UserError(f"--base-name {options.base_name}: expected a hub model's name, ORG/NAME")
    if options.proof_rows < 1:
        parser.error("--proof-rows N: at least 1; --no-proof leaves the comparison out")
    if options.no_proof and options.proof_data is not None:
        parser.error("--proof-data and --no-proof contradict each other")
    if options.gguf is not None and options.gguf not in GGUF_KINDS:
        raise UserError(
            f"--gguf {options.gguf}: {', '.join(GGUF_KINDS)} are written",
            hint="fewer bits: llama.cpp's llama-quantize with an importance matrix, on the bf16 "
            "file",
        )
    return options


def _show(job: MergeJob, result: MergeResult, *, as_json: bool) -> int:
    """Print what was made, and return the exit status."""
    is_proven = result.folder == job.output
    serving = job.serving(result.tokens, job.output)
    if as_json:
        content = {
            "output": str(result.folder) if is_proven else None,
            "unproven": None if is_proven else str(result.folder),
            "gguf": None if result.gguf is None else str(result.gguf),
            "notes": list(job.plan.notes),
            "proof": result.proof,
            "serving": dataclasses.asdict(serving),
        }
        print(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        _print_proof(result.proof)
        if is_proven:
            _print_serving(serving)
            print(f"\nmerged model: {result.folder}")
        if result.gguf is not None:
            print(f"GGUF: {result.gguf}")
    if not is_proven:
        print(
            f"error: the merge is not proven; what was written is kept as {result.folder}\n"
            "hint: merge_proof.json in it holds the figures; where the comparison itself failed, "
            "try a GPU or more memory, or --no-proof",
            file=sys.stderr,
        )
    elif result.gguf_error is not None:
        print(
            f"error: no GGUF file: {result.gguf_error}\n"
            f"hint: the merged model is whole; llama.cpp's convert_hf_to_gguf.py {result.folder}",
            file=sys.stderr,
        )
    return exit_status.OK if is_proven and result.gguf_error is None else exit_status.FAILED


def _print_proof(proof: Mapping[str, Any]) -> None:
    """Print the figures of merge_proof.json as a table, and what they mean."""
    weights, kept = proof["weights"], proof["share_of_update_kept"]
    dtypes = ", ".join(proof["dtypes"]).lower()
    print(
        f"{weights['num_layers']} layers merged, {proof['num_changed']} of "
        f"{proof['num_tensors']} tensors changed; {weights['num_values']:,} numbers read back: "
        f"each is the {dtypes} nearest to PEFT's merge in fp64"
    )
    if kept is not None:
        print(f"rounding to {dtypes} kept {kept:.1%} of the update")
    if proof["status"] == "skipped":
        print(f"answers not compared with base + adapter ({proof['reason']})")
        return
    if proof["status"] == "failed":
        print(f"the comparison failed: {proof['reason']}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{proof['num_positions']:,} tokens of {proof['num_rows']} rows")
    columns = ["base", "base + adapter", "merged"]
    trained = proof["trained"]
    if trained is not None:
        columns.append("merged, from 4 bit")
    for column in columns:
        table.add_column(column, justify="right")
    losses = [proof["base_loss"], proof["adapter_loss"], proof["merged_loss"]]
    table.add_row("loss", *(f"{loss:.4f}" for loss in losses))
    for title, key, form in _ROWS:
        cells = [form.format(proof["effect"][key]), "", form.format(proof["merged"][key])]
        if trained is not None:
            cells.append(form.format(trained[key]))
        table.add_row(title, *cells)
    Console().print(table, highlight=False)
    print(f"against base + adapter, in {proof['precision']} on {proof['device']}; {proof['rows']}")
    if trained is not None:
        print(
            f"the run trained beside the base in 4 bit (loss {proof['trained_loss']:.4f}): the "
            "last column is what leaving its rounding behind changes, and is not judged"
        )
    if proof["status"] == "not proven":
        print(f"NOT PROVEN: {proof['reason']}")
    else:
        print(f"proven: mean KL of the merged model at most {proof['kl_limit']:.1e}")


def _print_serving(serving: Serving) -> None:
    """Print the lines that serve adapter and merged model, and what stands against it."""
    print("\nserve the adapter beside its base:")
    for obstacle in serving.adapter_obstacles:
        print(f"  not with vLLM: {obstacle}")
    if serving.adapter_command is not None:
        print(f"  {serving.adapter_command}")
    print(f"serve the merged model:\n  {serving.merged_command}")
    for warning in serving.warnings:
        print(f"warning: {warning}")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lora_train")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
