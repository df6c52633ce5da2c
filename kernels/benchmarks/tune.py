"""Write the launch tables of the GPU that this runs on.

    python kernels/benchmarks/tune.py [--operations swiglu,rms_norm] [--seconds 300] [--out FOLDER]

Every entry of the tables that the shape of Llama-3.1-8B uses is replaced by its candidates, one
after the other, and the whole public operation is timed, in bf16. The fastest one stands in the
table from then on. The kernels of all candidates are compiled ahead in processes beside this one,
which fill Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from operations import OPERATIONS, Operation, Results
from shapes import LLAMA_31_8B, Shape, Tensors
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels import launch

Config = dict[str, Any]
Entries = list[dict[str, Any]]
Tables = dict[str, dict[str, Entries]]

WARMUP, RUNS = 3, 10
# the GPU is kept waiting for so long while the runs are queued: launches do not count
QUEUE_CYCLES = 10_000_000
# what is not faster by so much stays as it is
MARGIN = 0.01
# what spills badly can keep the assembler busy for minutes
COMPILE_SECONDS = 60.0
_SAFE = "sm_80"


class Tuning(NamedTuple):
    """One entry of a table."""

    entry: str
    operation: str
    """What is timed."""
    candidates: list[Config]
    meanwhile: dict[str, Config] = {}
    """Other entries, so that the operation takes the way that this one is for."""


def _all(**values: Sequence[Any]) -> list[Config]:
    """Return every combination of the values."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def _each(keys: str, values: Sequence[Sequence[Any]], **others: Sequence[Any]) -> list[Config]:
    """Return the listed values of the keys, with every combination of the others."""
    listed = [dict(zip(keys.split(), some, strict=True)) for some in values]
    return [some | more for some in listed for more in _all(**others)]


TILE = "BLOCK_M BLOCK_N num_warps"
ROWS = _all(BLOCK_M=[1, 2, 4], num_warps=[4, 8, 16], num_stages=[1])
TILES = _all(
    BLOCK_M=[16, 32, 64], BLOCK_K=[64, 128, 256], num_warps=[4, 8], num_stages=[1, 2, 3]
)  # fmt: skip
ELEMENTWISE = [
    (1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (4, 512, 4), (8, 512, 8), (4, 1024, 8), (8, 256, 4),
    (2, 2048, 8),
]  # fmt: skip
ADDED_PRODUCT = [
    (64, 128, 4), (32, 128, 4), (64, 64, 4), (128, 64, 8), (64, 256, 8), (32, 256, 4),
    (128, 128, 8), (16, 256, 4),
]  # fmt: skip
HEADS = [
    (4, 8, 4), (2, 8, 4), (8, 8, 4), (8, 8, 8), (4, 4, 4), (8, 4, 4), (16, 4, 4), (4, 16, 8),
    (2, 16, 4), (1, 32, 4), (16, 2, 4), (1, 8, 2),
]  # fmt: skip
MM, KERNEL = {"PRODUCT": "mm"}, {"PRODUCT": "kernel"}
ADDMM, TRITON = {"IMPLEMENTATION": "addmm"}, {"IMPLEMENTATION": "triton"}

# by table, in the order of their share of a training step; an entry that chooses between ways comes
# after those of the ways
TUNINGS: dict[str, list[Tuning]] = {
    "attention": [
        Tuning(
            "attention_forward", "attention_forward",
            _each(
                TILE,
                [
                    (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 32, 8),
                    (128, 64, 4), (128, 64, 8), (128, 128, 8),
                ],
                num_stages=[2, 3, 4], BRANCH=[True],
            )
            + _each(
                TILE, [(64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
                num_stages=[3], BRANCH=[False],
            ),
        ),
        Tuning(
            "attention_backward_queries", "attention_backward",
            _each(
                TILE,
                [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (64, 128, 8)],
                num_stages=[2, 3], BRANCH=[True],
            )
            + _each(TILE, [(64, 64, 4), (128, 64, 8)], num_stages=[3], BRANCH=[False]),
        ),
        Tuning(
            "attention_backward_keys", "attention_backward",
            _each(
                TILE,
                [(32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8), (128, 64, 8)],
                num_stages=[2, 3], BRANCH=[True],
            )
            + _each(TILE, [(64, 64, 4), (64, 128, 8)], num_stages=[3], BRANCH=[False]),
        ),
    ],
    "swiglu": [
        Tuning(
            "swiglu_backward", "swiglu_backward",
            _each(
                TILE,
                [
                    (64, 64, 8), (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 128, 8), (32, 128, 4),
                    (128, 32, 8),
                ],
                NUM_SPLITS=[7, 14, 28], num_stages=[1, 2, 3],
            ),
        ),
        Tuning(
            "swiglu_forward", "swiglu_forward",
            _each(
                TILE,
                [
                    (64, 64, 4), (64, 64, 8), (32, 128, 4), (32, 64, 4), (64, 128, 8),
                    (128, 64, 8), (64, 32, 4), (128, 32, 4),
                ],
                NUM_SPLITS=[7, 14, 28], num_stages=[1, 2, 3],
            ),
        ),
        Tuning(
            "swiglu_sum_splits", "swiglu_backward",
            _each("BLOCK_M num_warps", [(4, 1), (8, 2), (16, 4), (32, 4), (32, 8)], num_stages=[1]),
        ),
        Tuning(
            "swiglu_backward_adapter", "swiglu_backward_dropout",
            _each(TILE, [(64, 32, 4), (64, 64, 8)], NUM_SPLITS=[14], num_stages=[1, 2, 3]),
        ),
        Tuning(
            "swiglu_forward_elementwise", "swiglu_forward_no_adapter",
            _each(TILE, ELEMENTWISE, num_stages=[1]),
        ),
        Tuning(
            "swiglu_backward_elementwise", "swiglu_backward_no_adapter",
            _each(TILE, ELEMENTWISE, num_stages=[1]),
        ),
    ],
    "rms_norm": [
        Tuning(
            "add_rms_norm_rows", "add_rms_norm_forward", ROWS,
            meanwhile={"add_rms_norm_forward": MM},
        ),
        Tuning(
            "add_rms_norm_tiles", "add_rms_norm_forward_dropout", TILES,
            meanwhile={"add_rms_norm_forward_dropout": KERNEL},
        ),
        Tuning("add_rms_norm_forward", "add_rms_norm_forward", [MM, KERNEL]),
        Tuning("add_rms_norm_forward_dropout", "add_rms_norm_forward_dropout", [MM, KERNEL]),
        Tuning(
            "rms_norm_backward_rows", "rms_norm_backward", ROWS,
            meanwhile={"rms_norm_backward": MM},
        ),
        Tuning(
            "rms_norm_backward_tiles", "rms_norm_backward_dropout", TILES,
            meanwhile={"rms_norm_backward_dropout": KERNEL},
        ),
        Tuning("rms_norm_backward", "rms_norm_backward", [MM, KERNEL]),
        Tuning("rms_norm_backward_dropout", "rms_norm_backward_dropout", [MM, KERNEL]),
    ],
    "rope": [
        Tuning(
            "rope_forward", "rope_forward",
            _each("BLOCK_M BLOCK_H num_warps", HEADS, num_stages=[1]),
        ),
        Tuning(
            "rope_backward_elementwise", "rope_backward",
            _each("BLOCK_M BLOCK_H num_warps", HEADS, num_stages=[1]),
            meanwhile={"rope_backward": MM},
        ),
        Tuning(
            "rope_backward_product", "rope_backward",
            _all(BLOCK_M=[16, 32, 64], num_warps=[4, 8], num_stages=[2, 3, 4]),
            meanwhile={"rope_backward": KERNEL},
        ),
        Tuning("rope_backward", "rope_backward", [MM, KERNEL]),
    ],
    "project": [
        Tuning(
            "project_tiles", "project_dropout",
            _all(BLOCK_M=[16, 32, 64], BLOCK_K=[128, 256], num_warps=[4],
                  num_stages=[2, 3, 4]),
            meanwhile={"project_dropout": KERNEL},
        ),
        Tuning(
            "dropped", "dropped", _each("BLOCK_M BLOCK_K num_warps", ELEMENTWISE, num_stages=[1])
        ),
        Tuning(
            "add_masked_product", "add_masked_product",
            _each("BLOCK_M BLOCK_K num_warps", ADDED_PRODUCT, num_stages=[1]),
        ),
        Tuning("project", "project", [MM, KERNEL]),
        Tuning("project_dropout", "project_dropout", [MM, KERNEL]),
    ],
    "cross_entropy": [
        Tuning(
            "cross_entropy_rows", "linear_cross_entropy",
            _each(
                "LANES DEPTH num_warps",
                [
                    (2048, 4, 8), (1024, 4, 4), (2048, 2, 8), (4096, 2, 16), (4096, 4, 16),
                    (2048, 8, 8), (1024, 8, 4), (4096, 1, 16),
                ],
                CHUNK_ROWS=[1024], num_stages=[1],
            )
            + _each("CHUNK_ROWS", [[512], [2048]], LANES=[2048], DEPTH=[4], num_warps=[8],
                    num_stages=[1]),
        ),
    ],
    "nf4": [
        Tuning(
            "dequantize_nf4", "dequantize_nf4",
            _each(
                "BLOCK num_warps",
                [
                    (1024, 4), (512, 2), (2048, 8), (2048, 4), (4096, 8), (4096, 4), (1024, 2),
                    (8192, 8),
                ],
                num_stages=[1],
            ),
        ),
    ],
    "refresh": [
        Tuning(
            "refresh", "refresh",
            _each(
                "BLOCK num_warps",
                [(4096, 4), (2048, 4), (1024, 4), (2048, 2), (4096, 8), (8192, 8), (8192, 4),
                 (16384, 8)],
                num_stages=[1],
            ),
        ),
    ],
    "lora_linear": [
        Tuning(
            "lora_linear_product", "lora_linear_forward",
            _each(
                "BLOCK_M BLOCK_C num_warps",
                [(128, 256, 8), (128, 128, 8), (128, 128, 4), (256, 128, 8)],
                BLOCK_D=[64], GROUP_M=[8], num_stages=[3, 4],
            ),
            meanwhile={"lora_linear_forward": TRITON},
        ),
        Tuning("lora_linear_forward", "lora_linear_forward", [ADDMM, TRITON]),
        Tuning("lora_linear_backward", "lora_linear_backward", [ADDMM, TRITON]),
    ],
}  # fmt: skip
UNTUNED = {
    "attention_tiles": "microseconds",
    "attention_forward_wide": "fp32 and fp64, which nobody trains in",
    "attention_backward_queries_wide": "likewise",
    "attention_backward_keys_wide": "likewise",
    "lora_linear_product_wide": "likewise",
}
"""Entries that stay as they are, and why."""


def load_tables(folder: Path) -> Tables:
    """Return the launch tables of a GPU by name of the file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def format_table(table: dict[str, Entries]) -> str:
    """Return a table as it stands in its file, one entry a line."""
    kernels = []
    for kernel, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def entry_of(tables: Tables, kernel: str, width: int) -> dict[str, Any]:
    """Return the entry that `launch.launch_config` would take; it may be changed."""
    for table in tables.values():
        for entry in table.get(kernel, []):
            if entry["max_width"] is None or width <= entry["max_width"]:
                return entry
    raise LookupError(f"no entry for {kernel} of width {width}")


@contextlib.contextmanager
def launched_with(tables: Tables, configs: dict[str, Config]) -> Iterator[dict[str, int]]:
    """Let the kernels take their parameters from these tables, some from `configs`.

    Yields:
        The width with which each kernel has asked.
    """
    widths: dict[str, int] = {}

    def launch_config(kernel: str, device: torch.device, width: int) -> Config:
        widths[kernel] = width
        return dict(configs.get(kernel) or entry_of(tables, kernel, width)["config"])

    original = launch.launch_config
    launch.launch_config = launch_config
    try:
        yield widths
    finally:
        launch.launch_config = original


class Outcome(NamedTuple):
    """What became of one entry."""

    entry: str
    default_ms: float | None
    """None: nothing was measured."""
    best_ms: float | None
    config: Config
    num_timed: int
    rate: str


class Skipped(Exception):
    """A candidate cannot be used; says why."""


class OutOfTime(Exception):
    """The seconds are used up."""


def candidates_of(tuning: Tuning, current: Config) -> list[Config]:
    """Return what is tried, the present parameters first, with keys in the table's order."""
    ordered = [{key: config[key] for key in current} for config in tuning.candidates]
    return [current, *(config for config in ordered if config != current)]


def fastest(timed: list[tuple[Config, float]]) -> tuple[Config, float]:
    """Return the fastest; the first, unless another one is clearly faster."""
    best = min(timed, key=lambda pair: pair[1])
    return best if best[1] < timed[0][1] * (1 - MARGIN) else timed[0]


def disagreement(actual: Results, expected: Results) -> str | None:
    """Return the name of a result that differs by more than roundings; None if none does."""
    for name, truth in expected.items():
        # a rounding or two of an element, or of a summand as large as its row
        tolerance = max(2 * torch.finfo(truth.dtype).eps, 2.0**-12)
        truth = truth.float()
        typical = truth.square().mean(-1, keepdim=True).sqrt()
        difference = (actual[name].float() - truth).abs()
        if not (difference <= tolerance * (truth.abs() + typical)).all():
            return name
    return None


class Job(NamedTuple):
    """One compilation of one kernel, for another process."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    capability: int


def compile_ahead(job: Job) -> str | None:
    """Put a kernel into Triton's cache on disk; return what stopped it."""
    kernel = getattr(importlib.import_module(job.module), job.name)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    try:
        triton.compile(source, GPUTarget("cuda", job.capability, 32), job.options)
    except Exception as error:
        return _summary(error)
    return None


@contextlib.contextmanager
def recorded_jobs(capability: int) -> Iterator[list[Job]]:
    """Launch nothing, but list what would have been compiled for it."""
    jobs: list[Job] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        (attributes,) = compile["configs"]
        names = (
            "num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "launch_cooperative_grid"
        )  # fmt: skip
        jobs.append(
            Job(
                fn.module, fn.name, compile["signature"], compile["constants"], attributes,
                {name: compile[name] for name in names}, capability,
            )
        )  # fmt: skip
        # as if another cache had taken care of it
        return True

    knobs.runtime.jit_cache_hook = record
    try:
        yield jobs
    finally:
        knobs.runtime.jit_cache_hook = None


class Tuner:
    """Times the candidates of entries.

    Args:
        tables: of the GPU; what is found goes in.
        shape: of the operations.
        device: a GPU.
        dtype: of the operations.
        seconds: after which nothing more is timed.
    """

    def __init__(
        self,
        tables: Tables,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        seconds: float,
    ) -> None:
        self.tables = tables
        self._shape, self._device, self._dtype = shape, device, dtype
        self._end = time.monotonic() + seconds
        self._entries: dict[str, dict[str, Any]] = {}
        self._compiled: dict[str, AsyncResult[str | None]] = {}
        self._needed: dict[str, list[str]] = {}

    def compile_candidates(self, tuning: Tuning, pool: Pool, capability: int) -> None:
        """Begin to compile what the candidates of an entry need, the other entries as they are.

        Args:
            tuning: of the entry.
            pool: processes that compile.
            capability: of the GPU, such as 90.
        """
        for config in candidates_of(tuning, self._entry(tuning)["config"]):
            keys = []
            for job in self._jobs(tuning, config, capability):
                keys.append(repr(job))
                if keys[-1] not in self._compiled:
                    self._compiled[keys[-1]] = pool.apply_async(compile_ahead, (job,))
            self._needed[_key(tuning, config)] = keys

    def tune(self, tuning: Tuning) -> Outcome:
        """Time the candidates of an entry and put the fastest into the tables."""
        entry = self._entry(tuning)
        timed: list[tuple[Config, float]] = []
        rates: list[str] = []
        expected: Results = {}
        for config in candidates_of(tuning, entry["config"]):
            try:
                self._wait_for_kernels(tuning, config)
                with launched_with(self.tables, {**tuning.meanwhile, tuning.entry: config}):
                    ms, rate, results = self._timed(tuning, expected)
            except OutOfTime:
                break
            except Skipped as reason:
                print(f"  {tuning.entry} {_short(config)}: skipped, {reason}", flush=True)
                continue
            expected = expected or results
            timed.append((config, ms))
            rates.append(rate)
        outcome = Outcome(tuning.entry, None, None, entry["config"], len(timed), "")
        if not timed:
            return outcome
        best = fastest(timed)
        if timed[0][0] == entry["config"]:
            outcome = outcome._replace(default_ms=timed[0][1])
        entry["config"] = best[0]
        return outcome._replace(best_ms=best[1], config=best[0], rate=rates[timed.index(best)])

    def _entry(self, tuning: Tuning) -> dict[str, Any]:
        """Return the entry of the tables that the operation uses."""
        if tuning.entry not in self._entries:
            # asked, as it depends on the operation by which width its kernels look
            with launched_with(self.tables, tuning.meanwhile) as widths, recorded_jobs(0):
                self._operation(tuning).run()
            self._entries[tuning.entry] = entry_of(self.tables, tuning.entry, widths[tuning.entry])
        return self._entries[tuning.entry]

    def _jobs(self, tuning: Tuning, config: Config, capability: int) -> list[Job]:
        with (
            launched_with(self.tables, {**tuning.meanwhile, tuning.entry: config}),
            recorded_jobs(capability) as jobs,
            # what fails here will fail again where it is timed
            contextlib.suppress(Exception),
        ):
            self._operation(tuning).run()
        return jobs

    def _operation(self, tuning: Tuning) -> Operation:
        return OPERATIONS[tuning.operation](self._shape, Tensors(self._device, self._dtype))

    def _wait_for_kernels(self, tuning: Tuning, config: Config) -> None:
        for key in self._needed.get(_key(tuning, config), []):
            left = max(0.0, self._end - time.monotonic())
            try:
                error = self._compiled[key].get(min(left, COMPILE_SECONDS))
            except multiprocessing.TimeoutError:
                error = f"not compiled after {COMPILE_SECONDS:.0f} s"
            self._stop_at_end()
            if error is not None:
                raise Skipped(error)
        self._stop_at_end()

    def _stop_at_end(self) -> None:
        if time.monotonic() > self._end:
            raise OutOfTime

    def _timed(self, tuning: Tuning, expected: Results) -> tuple[float, str, Results]:
        try:
            operation = self._operation(tuning)
            # later runs may work on what the first one wrote
            results = {name: tensor.clone() for name, tensor in operation.run().items()}
            wrong = disagreement(results, expected)
            if wrong is not None:
                raise Skipped(f"{wrong} differs from the first candidate's")
            ms = _median_ms(operation.run)
        except Skipped:
            raise
        except Exception as error:
            # an error that stays would meet everything that follows
            torch.cuda.synchronize()
            raise Skipped(_summary(error)) from error
        return ms, _rate(operation, ms), results


def _median_ms(run: Callable[[], Any]) -> float:
    for _ in range(WARMUP):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    torch.cuda._sleep(QUEUE_CYCLES)
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events)


def _rate(operation: Operation, ms: float) -> str:
    if operation.num_flops:
        return f"{operation.num_flops / ms / 1e9:.0f} TFLOP/s"
    return f"{operation.num_bytes / ms / 1e6:.0f} GB/s"


def _key(tuning: Tuning, config: Config) -> str:
    return f"{tuning.entry} {json.dumps(config, sort_keys=True)}"


def _short(config: Config) -> str:
    return " ".join(f"{key}={value}" for key, value in config.items())


def _summary(error: Exception) -> str:
    # the compiler's errors hold all of its code
    return " ".join(f"{type(error).__name__}: {error}"[:200].split())


def _print_outcomes(outcomes: list[Outcome]) -> None:
    print(f"\n{'entry':34} {'default ms':>10} {'best ms':>8} {'':>12} {'timed':>5}  best")
    for outcome in outcomes:
        default, best = (
            "-" if ms is None else f"{ms:.4f}" for ms in (outcome.default_ms, outcome.best_ms)
        )
        print(
            f"{outcome.entry:34} {default:>10} {best:>8} {outcome.rate:>12}"
            f" {outcome.num_timed:5}  {_short(outcome.config)}"
        )


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - TUNINGS.keys())
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} are not among {list(TUNINGS)}")
    return [name for name in TUNINGS if name in names]


def main() -> None:
    """Tune the operations asked for and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=_names, default=list(TUNINGS), help=",".join(TUNINGS))
    parser.add_argument("--seconds", type=float, default=300, help="time that may pass")
    parser.add_argument("--out", type=Path, help="folder; default: the tables that are in use")
    arguments = parser.parse_args()
    # before the GPU is touched: its state does not survive a fork
    num_processes = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        major, minor = torch.cuda.get_device_capability()
        folder = launch.TABLES / f"sm_{major}{minor}"
        is_new = not folder.is_dir()
        tables = load_tables(launch.TABLES / _SAFE if is_new else folder)
        device = torch.device("cuda", torch.cuda.current_device())
        tuner = Tuner(tables, LLAMA_31_8B, device, torch.bfloat16, arguments.seconds)
        out = arguments.out or folder
        out.mkdir(parents=True, exist_ok=True)
        print(f"{torch.cuda.get_device_name()}: {LLAMA_31_8B.name}", flush=True)
        for name in arguments.operations:
            for tuning in TUNINGS[name]:
                tuner.compile_candidates(tuning, pool, 10 * major + minor)
        outcomes = []
        for name in arguments.operations:
            outcomes += [tuner.tune(tuning) for tuning in TUNINGS[name]]
            # a GPU without tables needs all of them
            for written in tuner.tables if is_new else [name]:
                (out / f"{written}.json").write_text(format_table(tuner.tables[written]))
    _print_outcomes(outcomes)


if __name__ == "__main__":
    main()
