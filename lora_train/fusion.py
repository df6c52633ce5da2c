"""The fused LoRA kernels in a run: what they take, and whether they compute what torch does."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.gathering import gather_from_all
from lora_train.kernel_cache import start_counting

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion

logger = logging.getLogger(__name__)

# names of modules that the log shows; a model has hundreds of one kind
_SHOWN = 3


def check_device(config: Config, device: torch.device) -> None:
    """Refuse early what `fuse_model` would refuse once data and model are loaded.

    Args:
        config: the run; `kernels.fused` is read.
        device: where the model will be.

    Raises:
        UserError: kernels.fused=required, and there is no GPU.
    """
    if config.kernels.fused == "required" and not _is_capable(device):
        _fall_back(config, _no_gpu(device))


def fuse_model(model: PeftModel, config: Config, device: torch.device) -> Fusion | None:
    """Let the fused kernels run what they can of a model, after they have proven themselves on it.

    Args:
        model: what `attach_adapter` returned.
        config: the run; `kernels.fused` is read.
        device: where the model is.

    Returns:
        What is fused; None: PEFT's own forward runs everywhere.

    Raises:
        UserError: kernels.fused=required, and something is not fused.
    """
    if config.kernels.fused == "off":
        logger.info("kernels: off, as asked; PEFT's own forward runs")
        return None
    if not _is_capable(device):
        # what nobody expects is no warning
        _fall_back(config, _no_gpu(device), logging.INFO)
        return None
    # imported here: triton takes a second, and Triton's interpreter is chosen when it is
    from lora_kernels.peft_bridge import fuse

    start_counting()
    fusion = fuse(model)
    # the weights were copied into the kernels' buffers: their former memory, in pieces of their
    # sizes, would stay with torch (16 GiB at 8B)
    torch.cuda.empty_cache()
    if fusion.decoder is not None:
        return _checked(fusion, config)
    if not fusion.fused or (fusion.unfused and config.kernels.fused == "required"):
        fusion.undo()
        _fall_back(config, "; ".join(_unfused_lines(fusion)) or str(fusion.decoder_obstacle))
        return None
    logger.info(
        "kernels: %d adapted layers are fused one by one (not the decoder as a whole: %s)",
        len(fusion.fused),
        fusion.decoder_obstacle,
    )
    for line in _unfused_lines(fusion):
        logger.warning("kernels: PEFT's own forward runs for %s", line)
    return fusion


def _checked(fusion: Fusion, config: Config) -> Fusion | None:
    """Return the fusion if it computes what torch does on this GPU, else undo it."""
    result = fusion.self_check()
    assert result is not None
    failures = _of_all_processes(result.failures)
    if failures:
        fusion.undo()
        where = "this GPU" if result.failures else "another process's GPU"
        _fall_back(
            config,
            f"on {where} they do not compute what torch does: {failures[0]}"
            + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""),
        )
        return None
    logger.info(
        "kernels: %d adapted layers are fused, the decoder as a whole; checked against torch "
        "on this GPU in %.1f s",
        len(fusion.fused),
        result.seconds,
    )
    return fusion


def _of_all_processes(failures: list[str]) -> list[str]:
    """Return those of every process, this one's first: all run the kernels, or none does.

    With a sharded base each gathers layers in the order of its own path, and two would wait for
    each other forever.
    """
    others = (line for lines in gather_from_all(failures) for line in lines)
    return list(dict.fromkeys([*failures, *others]))


def _is_capable(device: torch.device) -> bool:
    return device.type == "cuda"


def _no_gpu(device: torch.device) -> str:
    return f"they need an NVIDIA GPU, the model is on the {device.type.upper()}"


def _fall_back(config: Config, reason: str, level: int = logging.WARNING) -> None:
    if config.kernels.fused == "required":
        raise UserError(
            f"kernels.fused=required, but the kernels cannot be used: {reason}",
            hint="set kernels.fused=auto, which takes PEFT's own forward where it must",
        )
    logger.log(level, "kernels: not used, PEFT's own forward runs: %s", reason)


def _unfused_lines(fusion: Fusion) -> list[str]:
    """One line for each reason, with the modules that it is given for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in fusion.unfused.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"{', '.join(names[:_SHOWN])}{more}: {reason}")
    return lines
