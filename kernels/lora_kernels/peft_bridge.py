"""The door for PEFT models: `fuse(model)`, and `fusion.undo()`.

A model of the Llama family, all of whose adapters fit, runs as one function (`peft_decoder`). Any
other runs layer by layer (`peft_linear`), and what does not fit there runs PEFT's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lora_kernels.peft_decoder import FusedDecoder
from lora_kernels.peft_linear import fuse_linears, unfuse_linears
from lora_kernels.peft_obstacles import decoder_obstacle
from lora_kernels.self_check import CheckResult, check_decoder


@dataclass(frozen=True)
class Fusion:
    """What of a model is fused, and how."""

    model: PeftModel
    """The model."""
    decoder: FusedDecoder | None
    """The whole decoder; None: the model runs layer by layer."""
    decoder_obstacle: str | None
    """Why there is none."""
    fused: list[str]
    """Names of the adapted modules that the kernels run."""
    unfused: dict[str, str]
    """Names of those that run PEFT's own forward, and why."""

    def self_check(self) -> CheckResult | None:
        """Compare the decoder with torch on this GPU; None where each layer runs by itself."""
        if self.decoder is None or self.decoder.stack is None:
            return None
        return check_decoder(self.decoder.stack)

    def undo(self) -> None:
        """Give the model PEFT's and transformers' own forward everywhere."""
        if self.decoder is None:
            unfuse_linears(self.model)
        else:
            self.decoder.undo()


def fuse(model: PeftModel) -> Fusion:
    """Let the kernels run as much of a model as they can; see `Fusion` for what that is.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned. Its parameters stay
            its own: optimizers, saving, loading and merging are as before.

    Returns:
        What is fused and what is not.
    """
    obstacle = decoder_obstacle(model)
    if obstacle is None:
        names = [name for name, part in model.named_modules() if isinstance(part, LoraLayer)]
        return Fusion(model, FusedDecoder(model), None, names, {})
    report = fuse_linears(model)
    return Fusion(model, None, obstacle, report.fused, report.unfused)
