"""The report as one HTML page: no script, no file beside it, nothing from the network."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lora_train
from lora_train.config_loading import to_yaml
from lora_train.report import formats
from lora_train.report.comparison import different_settings, made_with, run_labels
from lora_train.report.drawing import to_svg
from lora_train.report.evaluations import FIGURE_NAMES, evaluation_rows, evaluation_table
from lora_train.report.findings import FIGURES, Findings, figure_texts
from lora_train.report.plots import Plot, make_gpu_plots, make_plots
from lora_train.report.time_split import NAMES

NO_GPU_LOG = (
    "No gpu_memory_log*.csv: the image's entrypoint records the GPUs of a run that it starts "
    "(singularity run lora.sif ..., and exec and srun of it)."
)
_NO_GPU_LOG_ON_CPU = "The run was on a CPU."
_MOST_SAMPLES = 10
# figures on the tiles of one run, with what stands below them
_TILES = {
    "last_loss": ("training loss", "first_loss"),
    "last_val_loss": ("validation loss", "first_val_loss"),
    "exact_match_after": ("exact match", "exact_match_before"),
    "tokens_per_second": ("speed", None),
    "mfu": ("MFU", None),
    "goodput": ("goodput", None),
    "wall_seconds": ("wall time", None),
    "gpu_hours": ("GPU-hours", None),
    "energy_kwh": ("energy", None),
    "peak_memory_bytes": ("GPU memory, most", None),
}


def render(runs: list[Findings]) -> str:
    """Write the page of one run, or of several side by side.

    Args:
        runs: at least one.

    Returns:
        The whole page.
    """
    import jinja2
    from markupsafe import Markup

    here = Path(__file__).parent
    # what models and users say is text, never markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined
    )
    is_one = len(runs) == 1

    def drawn(plots: list[Plot]) -> list[dict[str, Any]]:
        return [{"title": plot.title, "svg": Markup(to_svg(plot))} for plot in plots]  # noqa: S704

    labels = run_labels(runs)
    texts = [figure_texts(run) for run in runs]
    rows = [
        {"label": figure.label, "texts": [text[figure.key] for text in texts]}
        for figure in FIGURES
        if any(text[figure.key] != formats.UNKNOWN for text in texts)
    ]
    rows += evaluation_rows([run.evaluations for run in runs])
    return environment.get_template("page.html").render(
        title=runs[0].name if is_one else f"{len(runs)} runs side by side",
        subtitle=_subtitle(runs[0]) if is_one else ", ".join(labels),
        is_one=is_one,
        runs=[_run(run, label) for run, label in zip(runs, labels, strict=True)],
        plots=drawn(make_plots(runs)),
        gpu_plots=drawn(make_gpu_plots(runs[0])) if is_one else [],
        figure_rows=rows,
        evaluation_figures=FIGURE_NAMES,
        different=[] if is_one else different_settings(runs),
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        version=lora_train.__version__,
        now=time.strftime("%Y-%m-%d %H:%M"),
        num_unreadable=sum(run.record.num_unreadable for run in runs),
    )


def _run(run: Findings, label: str) -> dict[str, Any]:
    """All that the template shows of a run."""
    record, texts = run.record, figure_texts(run)
    command = record.environment.get("command")
    return {
        "label": label,
        "path": str(record.run.path),
        "state": run.state,
        "tiles": list(_tiles(run, texts)),
        "speed_notes": list(_speed_notes(run)),
        "goodput": _goodput(run),
        "time_parts": list(_time_parts(run)),
        "starts": list(_starts(run)),
        "gpu_rows": list(_gpu_rows(run)),
        "gpu_notes": list(_gpu_notes(run)),
        "no_gpu_log": _NO_GPU_LOG_ON_CPU if record.is_on_cpu else NO_GPU_LOG,
        "asked": [
            asdict(each) | {"share": formats.percent(each.share, 0)} for each in run.job.table
        ],
        "sbatch_lines": run.job.lines,
        "sbatch_replaced": " and ".join(run.job.replaced),
        "evaluations": [
            {"name": each.name, "lines": list(evaluation_table(each)), "notes": each.notes}
            for each in run.evaluations
        ],
        "samples": list(_samples(run)),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else None,
        "config": to_yaml(record.run.config),
        "made_with": list(made_with(run, is_short=False)),
    }


def _subtitle(run: Findings) -> str:
    record = run.record
    config, gpus = record.run.config, record.num_gpus
    parts = [config.model.path, f"on {config.data.path}", f"LoRA rank {config.peft.dim}"]
    if device := record.environment.get("device"):
        parts.append(f"{gpus} x {device}" if gpus and gpus > 1 else str(device))
    if record.starts:
        parts.append(f"started {record.local_time(record.starts[0].first.begin)}")
    return "; ".join(parts)


def _tiles(run: Findings, texts: dict[str, str]) -> Iterator[dict[str, str]]:
    for key, (label, before) in _TILES.items():
        if texts[key] == formats.UNKNOWN:
            continue
        note = f"from {texts[before]}" if before and texts[before] != texts[key] else ""
        if key == "mfu" and texts["hfu"] != texts["mfu"]:
            note = f"HFU {texts['hfu']}"
        if key == "tokens_per_second":
            note = f"{texts['step_seconds_p50']} a step"
        if key == "gpu_hours" and run.job.num_gpus:
            note = f"{run.job.num_gpus} GPU" + ("s" if run.job.num_gpus > 1 else "")
        if key == "goodput":
            note = "of the wall time"
        if key == "peak_memory_bytes":
            totals = [gpu.memory_total_mib * 2**20 for gpu in run.gpus]
            note = f"of {formats.gibibytes(totals[0])}" if totals else ""
        yield {"label": label, "text": texts[key], "note": note}


def _speed_notes(run: Findings) -> Iterator[str]:
    speed = run.speed
    peaks = " and ".join(f"{peak:,.0f}" for peak in speed.peaks_tflops)
    median, slow = speed.step_percentile(50), speed.step_percentile(95)
    if median and slow:
        yield (
            f"Half of the steps take up to {formats.duration(median)}, 95 of 100 up to "
            f"{formats.duration(slow)} ({slow / median:.1f} times that). The first step of each "
            "start, which compiles and warms up, is left out of speed and MFU."
        )
    if speed.why_no_mfu is not None:
        if len(speed.steps):
            yield f"No MFU: {speed.why_no_mfu}."
    else:
        yield (
            "MFU counts what LoRA needs: forward products and gradients of the inputs of the "
            "frozen layers, all three products of A and B, attention over the tokens that are "
            f"seen. It is a share of {peaks} TFLOP/s (dense bf16, by the data sheet); 6 operations "
            "a weight and token would show about 1.5 times as much. HFU counts activations that "
            "are computed again as well."
        )


def _goodput(run: Findings) -> str:
    time_split = run.time
    if time_split is None:
        return ""
    lost = time_split.num_lost_steps
    return (
        f"Goodput: {formats.percent(time_split.goodput)} of "
        f"{formats.duration(time_split.wall_seconds)} went into training steps that count."
        + (f" {lost} step(s) were lost by a kill and done again." if lost else "")
    )


def _time_parts(run: Findings) -> Iterator[dict[str, Any]]:
    if run.time is None or not run.time.wall_seconds:
        return
    most = max(run.time.seconds.values())
    for place, (kind, name) in enumerate(NAMES.items()):
        seconds = run.time.seconds[kind]
        if seconds > 0:
            yield {
                "name": name,
                "series": place,
                "seconds": formats.duration(seconds),
                "percent": formats.percent(seconds / run.time.wall_seconds),
                "width": round(100 * seconds / most, 1),
            }


def _starts(run: Findings) -> Iterator[dict[str, Any]]:
    for start in run.record.starts:
        last = start.spans[-1].step if start.spans else start.first.step
        reason = None if start.last is None else start.last.facts.get("reason")
        is_running = run.state.kind == "running" and start is run.record.starts[-1]
        yield {
            "began": run.record.local_time(start.first.begin),
            "host": start.first.facts.get("host") or formats.UNKNOWN,
            "job": start.first.facts.get("job") or formats.UNKNOWN,
            "steps": f"{start.first.step} to {last}",
            "seconds": formats.duration(start.seconds),
            "ended": reason or ("still runs" if is_running else "no end was recorded"),
        }


def _gpu_rows(run: Findings) -> Iterator[dict[str, str]]:
    for gpu in run.gpus:
        kwh, hours = gpu.energy()
        most = gpu.most("memory") * 2**20
        throttles = [
            f"{name} ({formats.percent(share)})" for name, share in gpu.throttles().items()
        ]
        yield {
            "name": gpu.name,
            "utilization": formats.percent(gpu.mean("utilization") / 100),
            "memory": formats.gibibytes(most),
            "memory_total": formats.gibibytes(gpu.memory_total_mib * 2**20),
            "power": formats.fixed(gpu.mean("power"), 0, "W"),
            "temperature": formats.fixed(gpu.most("temperature"), 0, "\N{DEGREE SIGN}C"),
            "energy": formats.fixed(kwh, 3, "kWh") if hours else formats.UNKNOWN,
            "throttles": ", ".join(throttles) or "nothing",
        }


def _gpu_notes(run: Findings) -> Iterator[str]:
    if run.starved is not None:
        yield (
            f"In {formats.percent(run.starved)} of the samples during training steps a GPU was "
            "busy for less than half of the time. Then it waits: for data, for Python, for another "
            "process, or its batches are small (data.micro_batch_size)."
        )
    if run.energy is not None:
        kwh, hours = run.energy
        gap = run.job.gpu_hours
        part = (
            f" That is {hours:.2f} of {gap:.2f} GPU-hours; the rest was not sampled."
            if gap is not None and hours < 0.95 * gap
            else ""
        )
        yield f"Energy: {kwh:.3f} kWh, drawn by the GPUs alone, from the samples' power.{part}"
    if any(math.isnan(gpu.mean("utilization")) for gpu in run.gpus):
        yield (
            "The driver reports no utilization of a MIG slice; power and energy are those of the "
            "whole GPU, which others may share."
        )
    if any("power cap" in gpu.throttles() for gpu in run.gpus):
        yield "A power cap holds the clock down under full load on most servers; it is no fault."


def _samples(run: Findings) -> Iterator[dict[str, Any]]:
    found = (run.record.summary or {}).get("samples")
    for sample in found[:_MOST_SAMPLES] if isinstance(found, list) else []:
        texts = {
            key: str(sample.get(key, "")) for key in ("prompt", "before", "after", "reference")
        }
        yield {**texts, "is_exact": sample.get("after_is_exact")}
