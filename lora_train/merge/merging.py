"""A merge from beginning to end: checked, written, proven, and only then under its name."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from lora_train.device import set_cpu_threads
from lora_train.errors import RunError
from lora_train.evaluation.progress import Countdown
from lora_train.merge.folder import TokenFacts, token_facts, write_files
from lora_train.merge.gguf_job import GgufJob, plan_gguf
from lora_train.merge.job import MergeJob, check_disk, unproven_folder
from lora_train.merge.model_card import merged_card
from lora_train.merge.proof import prove
from lora_train.merge.proof_inputs import ProofInputs, find_proof_inputs
from lora_train.merge.weight_check import adapted_layers, check_weights
from lora_train.merge.weights import write_merged
from lora_train.model import load_tokenizer
from lora_train.model_source import max_positions
from lora_train.paths import atomic_folder

log = logging.getLogger(__name__)

PROOF_FILE = "merge_proof.json"


@dataclass(frozen=True)
class MergeResult:
    """What was made."""

    folder: Path
    """The output; where the merge is not proven, the folder beside it."""
    proof: dict[str, Any]
    """Content of merge_proof.json."""
    tokens: TokenFacts
    gguf: Path | None = None
    gguf_error: str | None = None
    """Why there is no GGUF file although one was asked for."""


class _NotProven(Exception):
    """Ends the filling of a folder that must not get its name."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content["status"])
        self.content = content


def merge(job: MergeJob) -> MergeResult:
    """Write the merged model, and compare it with base and adapter.

    The folder gets its name when all is done. One that is not proven is kept as OUTPUT.unproven:
    writing it took long, and it shows what is wrong.

    Args:
        job: what to merge.

    Returns:
        What was made and measured.

    Raises:
        UserError: this machine or the data do not let it begin; nothing is written.
        RunError: the disk is full or not writable, or a weight that reads back is not the sum.
    """
    transformers_logging.disable_progress_bar()
    set_cpu_threads()
    layers = adapted_layers(job.base, job.adapter)
    tokenizer = load_tokenizer(job.base.model)
    facts = token_facts(tokenizer, job.base.folder)
    gguf = None
    if job.gguf_kind is not None:
        gguf = plan_gguf(job.gguf_kind, job.run.name, job.base.folder, job.plan, tokenizer)
    check_disk(job.output, job.plan.num_bytes + (0 if gguf is None else gguf.num_bytes))
    inputs = _find_inputs(job, tokenizer)
    kept = unproven_folder(job.output)
    try:
        with atomic_folder(job.output) as folder:
            return _fill(job, folder, layers, tokenizer, facts, inputs, gguf)
    except _NotProven as end:
        return MergeResult(kept, end.content, facts)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or job.output}: {error.strerror or error}",
            hint="nothing was left behind; --output on a file system with room that can be written",
        ) from error


def _find_inputs(job: MergeJob, tokenizer: Any) -> ProofInputs | None:
    if job.proof_rows == 0:
        return None
    tensors = [each.base for each in job.plan.tensors] + job.adapter.tensors
    return find_proof_inputs(
        job.run.config,
        tokenizer,
        job.proof_data,
        job.proof_rows,
        max_positions=max_positions(job.base.model),
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        vocabulary=max(len(tokenizer), job.vocabulary or 0),
        num_kept=1 if job.run.config.model.quantization is None else 2,
    )


def _fill(
    job: MergeJob,
    folder: Path,
    layers: dict[str, Any],
    tokenizer: Any,
    facts: TokenFacts,
    inputs: ProofInputs | None,
    gguf: GgufJob | None,
) -> MergeResult:
    """Fill the folder; move it aside where it is not proven."""
    total = len(job.plan.tensors)
    with Countdown(Console(stderr=True), "merging, tensors", total=total, done=0) as progress:
        rounding = write_merged(job.plan, folder, progress.advance)
    weights = check_weights(job.plan, layers, folder)
    template = tokenizer.chat_template if job.run.config.model.chat_template else None
    write_files(job.plan.config, job.base.folder, folder, chat_template=template, facts=facts)
    content = {
        "run": job.run.name,
        "base": {
            "name": job.base_name.name,
            "revision": job.base_name.revision or job.base.commit,
            "checked_by": job.base.identity,
        },
        "dtypes": job.plan.dtypes,
        "num_tensors": total,
        "num_changed": job.plan.num_changed,
        "weights": asdict(weights),
        "share_of_update_kept": rounding.share_kept,
    }
    if inputs is None:
        content |= {"status": "skipped", "reason": "--no-proof was given"}
    else:
        content |= _compare(job, folder, inputs)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / PROOF_FILE).write_text(text, encoding="utf-8")
    if content["status"] in ("not proven", "failed"):
        folder.rename(unproven_folder(job.output))
        raise _NotProven(content)
    dtypes = ", ".join(job.plan.dtypes).lower()
    card = merged_card(job.run.config, job.base_name, job.run.path, dtypes=dtypes, proof=content)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if gguf is None:
        return MergeResult(job.output, content, facts)
    try:
        file = gguf.write(folder)
    except Exception as error:
        # the merged model is whole and proven: it is not thrown away for this
        return MergeResult(job.output, content, facts, gguf_error=str(error))
    return MergeResult(job.output, content, facts, gguf=job.output / file.name)


def _compare(job: MergeJob, folder: Path, inputs: ProofInputs) -> dict[str, Any]:
    """Return what merge_proof.json holds of the answers of both models."""
    about = {
        "rows": inputs.source, "num_rows": inputs.num_rows, "num_supervised": inputs.num_supervised,
    }  # fmt: skip
    quantization = job.run.config.model.quantization
    as_trained = replace(job.base.model, quantization=quantization) if quantization else None
    merged = replace(job.base.model, path=str(folder))
    try:
        proof = prove(job.base.model, job.adapter.folder, merged, inputs, quantized=as_trained)
    except Exception as error:
        # minutes of writing are not thrown away because a GPU was too full
        log.debug("the comparison failed", exc_info=True)
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}", **about}
    verdict = {"status": "proven"}
    if proof.failure is not None:
        verdict = {"status": "not proven", "reason": proof.failure}
    return {**verdict, **about, **proof.to_dict()}
