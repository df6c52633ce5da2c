"""GPU memory of a step of PEFT's own forward, under bf16 autocast. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_train.plan.tape import GRADIENTS, KEPT, LOGITS, WORKING, Tape

if TYPE_CHECKING:
    from lora_train.plan.memory import Step


def walk_unfused(tape: Tape, step: Step) -> None:
    """Walk through a step.

    Args:
        tape: with what is there all the time.
        step: what is to be computed.
    """
    shape, t = step.shape, step.tokens
    tape.now = "forward"
    layer = layer_bytes(step)
    boundary = 2 * t * shape.hidden
    if step.checkpointing:
        tape.add(KEPT, shape.num_layers * boundary)
    else:
        tape.add(KEPT, shape.num_layers * layer)
    tape.now = "loss"
    # in fp32: log-probabilities, their gradient and that of the logits; measured on an H100
    tape.free(LOGITS, tape.add(LOGITS, step.supervised_tokens * shape.vocabulary * 12))
    tape.now = "backward"
    if step.checkpointing:
        tape.add(KEPT, layer)
    tape.add(WORKING, 4 * 2 * t * max(shape.intermediate, shape.hidden))
    if step.num_gpus == 1:
        tape.add(GRADIENTS, 4 * shape.trained)


def layer_bytes(step: Step) -> int:
    """Return what autograd keeps of a layer.

    Two norms keep their input in fp32; each linear with an adapter its input in bf16; attention its
    operands and its output; the MLP the inputs of its activation and of its product.
    """
    shape, t = step.shape, step.tokens
    attention = 2 * (2 * shape.attention_width + 2 * shape.key_width)
    norms = 2 * (4 + 2) * shape.hidden
    mlp = 8 * shape.intermediate
    ranks = 2 * sum(sum(group.ranks) for group in shape.layers[0].values())
    return t * (attention + norms + mlp + ranks + 4 * shape.num_heads)
