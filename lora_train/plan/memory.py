"""GPU memory of a training step: the step is walked through, allocation by allocation.

The fused step's code says what is live when (`lora_kernels.decoder`, `decoder_layer`,
`cross_entropy`); this follows it line by line, so that the peak comes with what it consists of. The
constants that no code says were measured; see kernels/benchmarks/benchmark_plan.py. Imports no
torch.

Letters: T tokens of a micro-batch, K hidden size, I intermediate size, P rank columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_train.plan.shape import Group, Shape
from lora_train.plan.tape import (
    ADAPTER,
    COPIES,
    GRADIENTS,
    KEPT,
    LOGITS,
    OPTIMIZER,
    OTHER,
    WEIGHTS,
    WORKING,
    Tape,
)
from lora_train.plan.unfused import walk_unfused

# CUBLAS_WORKSPACE_CONFIG=:4096:8, which deterministic runs set, and as much that cuBLASLt takes
# beside it, measured on an H100
_WORKSPACE = 73 * 2**20
# entries of kernels/lora_kernels/launch_tables/*/{cross_entropy,swiglu}.json
_CHUNK_ROWS = ((32768, 4096), (65536, 2048), (163840, 1024))
_LEAST_CHUNK_ROWS = 512
_SPLITS, _SPLIT_COLUMNS, _MAX_COLUMNS_IN_KERNEL = 28, 128, 64


@dataclass(frozen=True)
class Step:
    """What decides about the memory of a step, and its time."""

    shape: Shape
    tokens: int
    """T, of a micro-batch."""
    num_sequences: int
    """That share them."""
    is_quantized: bool = False
    """Whether the decoder's matrices are nf4."""
    double_quantization: bool = True
    checkpointing: bool = False
    is_fused: bool = True
    accumulation: int = 1
    """Micro-batches of a step on one GPU."""
    num_gpus: int = 1
    num_shards: int = 1
    """GPUs that share each layer of the base (trainer.strategy=fsdp2)."""
    is_optimizer_8bit: bool = False
    has_dropout: bool = False
    keeps_on_host: bool = True
    """Whether host memory has room for what checkpointing keeps."""
    supervised: float = 1.0
    """Share of the tokens that go through the output layer."""

    @property
    def is_sharded(self) -> bool:
        """Whether no GPU holds all of the base."""
        return self.num_shards > 1

    @property
    def supervised_tokens(self) -> int:
        """Of a micro-batch, at least one."""
        return max(1, round(self.supervised * self.tokens))


def walk(step: Step) -> Tape:
    """Walk through a training step.

    Args:
        step: what is to be computed.

    Returns:
        The tape; its peak is what `torch.cuda.max_memory_allocated` shows.
    """
    tape = Tape(now="the frozen model")
    _resident(tape, step)
    (_walk_fused if step.is_fused else walk_unfused)(tape, step)
    return tape


def _resident(tape: Tape, step: Step) -> None:
    """Allocate what is there all the time from the second step on."""
    shape = step.shape
    whole = shape.total - shape.matrices
    tape.add(WEIGHTS, 2 * whole)
    matrices = shape.matrices // step.num_shards
    if step.is_quantized:
        blocks = matrices // 64
        maxima = blocks + blocks // 64 if step.double_quantization else 4 * blocks
        # packed, maxima, and small tables of each matrix
        tape.add(WEIGHTS, matrices // 2 + maxima + shape.num_layers * 7 * 2048)
    else:
        tape.add(WEIGHTS, 2 * matrices)
    if step.is_fused:
        on_demand = step.is_quantized or step.is_sharded
        buffers = set()
        for layer in shape.layers:
            for group in layer.values():
                copies = group.rank_columns * (group.num_in + group.num_out)
                corner = 0 if on_demand else group.rank_columns**2
                tape.add(COPIES, 2 * (copies + corner))
                buffers.add((group.num_out, group.num_in, group.rank_columns))
        if on_demand:
            tape.add(COPIES, sum(2 * (n + p) * (k + p) for n, k, p in buffers))
        if step.is_sharded:  # the layer in use and the one being gathered
            tape.add(COPIES, 4 * shape.matrices // shape.num_layers)
    tape.add(ADAPTER, 4 * shape.trained)
    tape.add(OPTIMIZER, (2.1 if step.is_optimizer_8bit else 8) * shape.trained)
    if step.num_gpus > 1:
        tape.add(GRADIENTS, 4 * shape.trained)
    # ids, labels, positions, places that predict and targets
    tape.add(OTHER, _WORKSPACE + 5 * 8 * step.tokens)


def _walk_fused(tape: Tape, step: Step) -> None:
    shape, t, width = step.shape, step.tokens, step.shape.hidden
    adds_up = step.accumulation > 1 and step.num_gpus == 1
    if adds_up:
        tape.add(GRADIENTS, 4 * shape.trained)
    tape.now = "forward"
    # cos and sin, halved, and as the model's own module gives them
    tape.add(KEPT, 4 * t * shape.head_dim)
    rotations = tape.add(WORKING, 8 * t * shape.head_dim)
    hidden = tape.add(KEPT, 2 * t * width)
    kept: list[list[int]] = []
    delta: list[int] = []
    last = shape.num_layers - 1
    for index, layer in enumerate(shape.layers):
        tape.now = f"forward, layer {index}"
        saved, new_delta = _layer_forward(
            tape, step, layer, is_first=index == 0, is_last=index == last
        )
        tape.free(WORKING, *delta)
        delta = [new_delta]
        if step.checkpointing and index != last:
            r1, *others = saved
            tape.free(KEPT, *others)
            if step.keeps_on_host and index > 0:
                tape.free(KEPT, r1)
                saved = []
            else:
                saved = [r1]
        kept.append(saved)
    tape.now = "loss"
    out = tape.add(WORKING, 2 * t * width)
    d_hidden = tape.add(WORKING, 2 * t * width)
    stride = -(-shape.vocabulary // 64) * 64
    rows = _chunk_rows(step.supervised_tokens, shape.vocabulary)
    logits = tape.add(LOGITS, 2 * rows * stride)
    tape.free(LOGITS, logits)
    tape.free(WORKING, rotations, out)
    dr = tape.add(WORKING, 2 * t * (width + shape.layers[last]["down"].rank_columns))
    tape.free(WORKING, *delta)
    fetched: list[int] = []
    for index in reversed(range(shape.num_layers)):
        tape.now = f"backward, layer {index}"
        saved = kept.pop()
        if step.checkpointing and index != last:
            if step.keeps_on_host:
                # this layer's input has come back, the next one's is on its way
                fetched.append(tape.add(WORKING, 2 * t * width))
                if index > 0 and len(fetched) == 1:
                    fetched.append(tape.add(WORKING, 2 * t * width))
            tape.free(KEPT, *saved)
            saved = _recompute(tape, step, shape.layers[index])
        below = shape.layers[index - 1]["down"] if index > 0 else None
        dr = _layer_backward(tape, step, shape.layers[index], below, dr, is_last=index == last)
        tape.free(KEPT, *saved)
        if fetched:
            tape.free(WORKING, fetched.pop(0))
    tape.free(WORKING, d_hidden)
    tape.free(KEPT, hidden)


def _layer_forward(
    tape: Tape, step: Step, layer: dict[str, Group], *, is_first: bool, is_last: bool
) -> tuple[list[int], int]:
    """Return what the layer keeps, its input first, and its last summand."""
    t, width = step.tokens, step.shape.hidden
    heads = step.shape.attention_width
    x = _adder(tape, WORKING, 2 * t)
    keep = _adder(tape, KEPT, 2 * t)
    r1 = 0 if is_first else keep(width)
    x_aug = x(width + layer["qkv"].rank_columns)
    dropped = x(width) if step.has_dropout else 0
    saved = [r1, tape.add(KEPT, 4 * t), keep(layer["qkv"].num_out)]
    tape.free(WORKING, x_aug, dropped)
    saved += [keep(layer["qkv"].rank_used)]
    if step.shape.family == "qwen3":
        saved.append(keep(heads + step.shape.key_width))
    saved += [
        keep(heads + layer["o"].rank_columns),
        tape.add(KEPT, 4 * t * step.shape.num_heads),
    ]
    read = 0
    if is_last:  # a copy of the tokens that are read
        saved.append(keep(heads + layer["o"].rank_columns))
        read = x(width)
    saved += [keep(width), tape.add(KEPT, 4 * t)]
    x_aug = x(width + layer["gate_up"].rank_columns)
    dropped = x(width) if step.has_dropout else 0
    saved.append(keep(layer["gate_up"].num_out))
    tape.free(WORKING, x_aug, dropped)
    saved.append(keep(layer["gate_up"].rank_used))
    act = x(layer["down"].num_in + layer["down"].rank_columns)
    tape.free(WORKING, tape.add(WORKING, _partial(step, layer["down"].rank_used)))
    saved.append(keep(layer["down"].rank_used))
    delta = x(width)
    tape.free(WORKING, act, read)
    return saved, delta


def _recompute(tape: Tape, step: Step, layer: dict[str, Group]) -> list[int]:
    """Run a layer again, without its last product; return what it keeps."""
    saved, delta = _layer_forward(tape, step, layer, is_first=True, is_last=False)
    tape.free(WORKING, delta)
    return saved


def _layer_backward(
    tape: Tape,
    step: Step,
    layer: dict[str, Group],
    below: Group | None,
    dr: int,
    *,
    is_last: bool,
) -> int:
    """Free the gradient of the layer's output and return that of its input."""
    t, width = step.tokens, step.shape.hidden
    x = _adder(tape, WORKING, 2 * t)
    down, gate_up, o, qkv = (layer[name] for name in ("down", "gate_up", "o", "qkv"))
    gradients = []
    dact = x(down.num_in)
    d_gate_up = x(gate_up.num_out + gate_up.rank_columns)
    widest = max(gate_up.ranks, default=0)
    if 0 < widest <= _MAX_COLUMNS_IN_KERNEL:
        tape.free(WORKING, tape.add(WORKING, _partial(step, gate_up.rank_used)))
    gradients.append(_gradients(tape, down))
    tape.free(WORKING, dact)
    dx = x(width)
    dr2 = x(width + o.rank_columns)
    gradients.append(_gradients(tape, gate_up))
    tape.free(WORKING, dx, d_gate_up)
    gradients.append(_gradients(tape, o))
    d_att = x(o.num_in)
    if is_last:  # spread over all tokens again
        spread = x(o.num_in)
        tape.free(WORKING, d_att)
        d_att = spread
        spread = x(width + o.rank_columns)
        tape.free(WORKING, dr2)
        dr2 = spread
    d_qkv = x(qkv.num_out + qkv.rank_columns)
    tape.free(WORKING, tape.add(WORKING, 4 * t * step.shape.num_heads))
    tape.free(WORKING, d_att)
    dr1 = 0
    if below is not None:
        dx = x(width)
        dr1 = x(width + below.rank_columns)
        tape.free(WORKING, dx)
    gradients.append(_gradients(tape, qkv))
    tape.free(WORKING, d_qkv, dr2, dr)
    if step.num_gpus > 1:  # they have been added to the buffer that travels
        tape.free(GRADIENTS, *gradients)
    return dr1


def _gradients(tape: Tape, group: Group) -> int:
    """Allocate the gradients of a group's adapters, in fp32."""
    # of all B together first
    tape.free(WORKING, tape.add(WORKING, 4 * group.num_out * group.rank_used))
    size = 4 * group.rank_used * group.num_in
    size += sum(4 * rank * n for rank, n in zip(group.ranks, group.nums_out, strict=True))
    return tape.add(GRADIENTS, size)


def _partial(step: Step, rank_columns: int) -> int:
    """Sums of the columns' splits, in fp32."""
    if not 0 < rank_columns <= 2 * _MAX_COLUMNS_IN_KERNEL:
        return 0
    tiles = -(-step.shape.intermediate // _SPLIT_COLUMNS)
    splits = -(-tiles // -(-tiles // _SPLITS))
    return 4 * splits * step.tokens * rank_columns


def _chunk_rows(num_rows: int, vocabulary: int) -> int:
    """Rows of logits that are there at once: about as many in each chunk, in whole tiles."""
    most = next((rows for width, rows in _CHUNK_ROWS if vocabulary <= width), _LEAST_CHUNK_ROWS)
    even = -(-num_rows // -(-num_rows // most))
    return min(num_rows, -(-even // 128) * 128)


def _adder(tape: Tape, part: str, row_bytes: int) -> Callable[[int], int]:
    """Return a function that allocates a matrix of so many columns."""
    return lambda columns: tape.add(part, row_bytes * columns)
