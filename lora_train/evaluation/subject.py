"""Which model is evaluated, and what its figures are called. Imports no torch by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.checkpoint import complete_at
from lora_train.config import Config, ModelConfig
from lora_train.errors import UserError
from lora_train.recorded_run import RecordedRun

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model that is not loaded yet."""

    model: ModelConfig
    """The base model, or the whole one."""
    adapter: Path | None
    """Folder of the adapter in PEFT's format; None: the model alone."""
    step: int | None
    """The checkpoint's step, where the adapter is not that of a finished run."""
    variants: tuple[str, ...]
    """What is measured: `adapter`, `base`, both with the adapter first, or `model`."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this model from another one, as JSON values."""
        path = Path(self.model.path).expanduser()
        files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
        # a merged model made anew has the same name and the same sizes
        weights = {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.suffix in (".safetensors", ".bin", ".gguf")
        }
        return {
            "model": [self.model.path, self.model.revision, self.model.quantization, weights],
            "adapter": None if self.adapter is None else adapter_hash(self.adapter),
        }

    def describe(self) -> dict[str, Any]:
        """Return what a summary says of it: `subject` in words, `model`, `adapter`, `step`."""
        words = self.model.path
        if self.adapter is not None:
            step = "" if self.step is None else f" (step {self.step})"
            words = f"{self.adapter}{step} on {self.model.path}"
        return {
            "subject": words,
            "model": self.model.path,
            "adapter": None if self.adapter is None else str(self.adapter),
            "step": self.step,
        }


def adapter_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and settings."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_subject(
    run: RecordedRun | None, *, which: str, checkpoint: int | None, model: str | None
) -> Subject:
    """Find the model that a command line asks for.

    Args:
        run: the run, if any.
        which: of a run: adapter, base or both.
        checkpoint: the step whose adapter is taken; None: the newest.
        model: another model, evaluated as the run's would be: a folder or hub name.

    Returns:
        What to load.

    Raises:
        UserError: the run has no such adapter yet.
    """
    if model is not None:
        section = ModelConfig(path=model) if run is None else run.config.model
        section = dataclasses.replace(section, path=model, revision=None, quantization=None)
        return Subject(section, None, None, ("model",))
    assert run is not None
    section = run.config.model
    if which == "base":
        return Subject(section, None, None, ("base",))
    if checkpoint is None:
        adapter, step = run.adapter()
    else:
        found = complete_at(run.path / "checkpoints", checkpoint)
        adapter, step = found.adapter, found.step
    return Subject(section, adapter, step, ("adapter", "base") if which == "both" else ("adapter",))


@dataclass(frozen=True)
class LoadedSubject:
    """The model on its device."""

    model: Any
    """A transformers model, in a PeftModel where there is an adapter; in eval mode."""
    tokenizer: Any
    """Its tokenizer."""
    device: torch.device
    """Where it is."""
    dtype: torch.dtype
    """Of its arithmetic."""

    @contextlib.contextmanager
    def as_variant(self, name: str) -> Iterator[None]:
        """Inside the block the model answers as `adapter`, `base` or `model`."""
        import torch

        is_narrow = self.dtype == torch.bfloat16
        without = name == "base" and hasattr(self.model, "disable_adapter")
        with (
            self.model.disable_adapter() if without else contextlib.nullcontext(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_narrow),
        ):
            yield


def load_subject(subject: Subject, config: Config, tokenizer: Any) -> LoadedSubject:
    """Load the model as the run's validation has it: precision, attention, fused kernels.

    With this very model it is proven that a packed row sees no other.

    Args:
        subject: which.
        config: the run; `trainer.precision` and `kernels` are read.
        tokenizer: the model's.

    Returns:
        The model.

    Raises:
        UserError: it cannot be found, read or held by the device.
        RunError: packed rows see each other.
    """
    from safetensors import SafetensorError

    from lora_train.adapter import load_adapter
    from lora_train.attention import check_isolation
    from lora_train.device import compute_deterministically, select_device, select_precision
    from lora_train.fusion import fuse_model
    from lora_train.model import describe_model, load_base_model

    device = select_device()
    precision = select_precision(config.trainer.precision, device)
    compute_deterministically()
    model: Any = load_base_model(subject.model, precision.dtype, device)
    logger.info("model: %s", describe_model(model))
    fusion = None
    if subject.adapter is not None:
        try:
            model = load_adapter(model, subject.adapter)
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise UserError(
                f"the adapter {subject.adapter} cannot be put on {subject.model.path}: {error}",
                hint="its files are damaged, or the base model is another one than the run was "
                "trained on",
            ) from error
        fusion = fuse_model(model, config, device)
    model.eval()
    loaded = LoadedSubject(model, tokenizer, device, precision.dtype)
    for name in subject.variants:
        with loaded.as_variant(name):
            check_isolation(
                model, model.get_input_embeddings().num_embeddings, device,
                is_fused=fusion is not None and fusion.decoder is not None,
            )  # fmt: skip
    return loaded
