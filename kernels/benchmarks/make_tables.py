"""Put what the benchmarks measured into the README, and draw it.

    python kernels/benchmarks/make_tables.py [--check]

Reads results/training_step.jsonl and results/operations.jsonl, writes a table of each between its
markers in README.md, and training_step.svg beside this file. Of each variant the newest row counts,
among those measured on the GPU, the shape and the versions of the file's newest row. With --check
nothing is written, and the exit status is 1 if a file is not what the rows give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
CHART = HERE / "training_step.svg"
TRAINING_STEP = HERE / "results" / "training_step.jsonl"
OPERATIONS = HERE / "results" / "operations.jsonl"
OURS, PEER, FROZEN = "ours", "peers", "frozen"
# the colours of Okabe and Ito, told apart by the colour-blind too
COLOURS = {OURS: "#0072b2", PEER: "#e69f00", FROZEN: "#999999"}
LEGEND = {OURS: "lora-train", PEER: "transformers + PEFT", FROZEN: "frozen model, nothing trained"}
# what others reach with everything on; the rest is given in multiples of it
BASELINE = "liger + PEFT, bf16 adapters"
VERSIONS = ("torch", "triton", "transformers", "peft")
# rows that differ in one of these are not put beside each other
SETTING = ("gpu", "model", "lora", "shape", "dtype", *VERSIONS)
Row = dict[str, Any]


class Shown(NamedTuple):
    """A variant of the training step in the table and the chart."""

    variant: str
    kind: str
    label: str = ""
    """Where it is not the variant's name."""


VARIANTS = (
    Shown("fused", OURS, "lora-train, fused"),
    Shown("fused, dropout 0.1", OURS),
    Shown("fused, rank 64", OURS),
    Shown("fused, 16 mixed sequences", OURS, "fused, 16 packed sequences of mixed length"),
    Shown("fused, checkpointing", OURS),
    Shown("fused, checkpointing, 8 x 2048", OURS),
    Shown("fused, nf4", OURS),
    Shown("fused, nf4, checkpointing", OURS),
    Shown("frozen, our kernels", FROZEN),
    Shown("kernels.fused=off", OURS, "lora-train, kernels off"),
    Shown("stock PEFT", PEER, "PEFT, its defaults"),
    Shown("stock PEFT, bf16 autocast", PEER),
    Shown("stock PEFT, bf16 adapters", PEER),
    Shown(BASELINE, PEER),
    Shown("liger + PEFT, bf16 adapters, checkpointing", PEER),
    Shown("liger, frozen without LoRA", FROZEN),
)


def newest(path: Path, key: Callable[[Row], Any], needed: str) -> list[Row]:
    """Read the rows of the newest setting, one for each key, in the order of their first ones.

    Args:
        path: of a file of JSON rows; it may be missing.
        key: names what a row measured; of equal ones the last of the latest date is taken.
        needed: a field; rows without it are of an older format and are passed over.

    Returns:
        The rows, none where the file is missing or all of it is of an older format.
    """
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            sys.exit(f"{path}:{number}: not a JSON row: {error}\nhint: delete the line")
    rows = [row for row in rows if needed in row]
    if not rows:
        return []
    # sorted() is stable: of one date, what was appended last stays last
    by_date = sorted(rows, key=lambda row: row["date"])
    setting = [by_date[-1].get(name) for name in SETTING]
    latest = {key(row): row for row in by_date if [row.get(name) for name in SETTING] == setting}
    order = dict.fromkeys(key(row) for row in rows)
    return [latest[name] for name in order if name in latest]


def setting_of(rows: list[Row], shape: str) -> str:
    """Say in a line what the rows were measured on, and when."""
    row = rows[0]
    versions = [f"{name} {row[name]}" for name in VERSIONS if name in row]
    dates = sorted({row["date"] for row in rows})
    return f"{', '.join([row['gpu'], *versions])}; {shape}; {', '.join(dates)}."


def training_shape(rows: list[Row]) -> str:
    """Name the model, the adapters and the tokens that most of the rows share."""
    tokens, sequences = mode((row["tokens_per_step"], row["sequences"]) for row in rows)
    batch = f"{tokens:,} tokens in {sequences} sequences per step where not said otherwise"
    return f"{rows[0]['model']}; LoRA {rows[0]['lora']}; {batch}"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Write a Markdown table: the first column to the left, figures to the right."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def training_table(rows: list[tuple[Shown, Row]]) -> str:
    """Write the training steps; where there is no baseline, no multiples of it."""
    baseline = {shown.variant: row["tokens_per_second"] for shown, row in rows}.get(BASELINE)
    lines, most = [], 0.0
    for shown, row in rows:
        speed = row["tokens_per_second"]
        share = row["kernel_seconds"] / row["step_seconds_median"]
        most = max(most, share)
        lines.append(
            [
                shown.label or shown.variant,
                f"{speed:,.0f}",
                f"{speed / baseline:.2f}" if baseline else "-",
                f"{row['max_memory_allocated_gib']:.1f}",
                f"{share:.0%}",
            ]
        )
    heads = ["variant", "tokens/s", f'x of "{BASELINE}"', "peak GiB", "time in kernels"]
    parts = [setting_of([row for _, row in rows], training_shape([row for _, row in rows]))]
    parts.append(table(heads, lines))
    if most > 1.005:
        # checkpointing puts what it keeps into host memory, on a stream of its own
        parts.append("Above 100 %: copies to and from host memory run beside the kernels.")
    return "\n\n".join(parts)


def operations_table(rows: list[Row]) -> str:
    """Write the operations, each beside the fastest of its other providers."""
    if not rows:
        return "Not measured yet: `python kernels/benchmarks/benchmark_operations.py`."
    lines = []
    for name in dict.fromkeys(row["operation"] for row in rows):
        of_it = [row for row in rows if row["operation"] == name]
        ours = next((row for row in of_it if row["provider"].startswith("ours")), None)
        if ours is None:
            continue
        others = [row for row in of_it if row is not ours]
        other, speedup = "-", "-"
        if others:
            best = min(others, key=lambda row: row["ms"])
            provider = best["provider"].removeprefix("torch").removeprefix(", ")
            other = f"{best['ms']:.3f}" + (f" ({provider})" if provider else "")
            speedup = f"{best['ms'] / ours['ms']:.2f}"
        rate = f"{ours['gb_per_second']:,.0f} GB/s"
        if ours["tflop_per_second"] is not None:
            rate = f"{ours['tflop_per_second']:,.0f} TFLOP/s"
        lines.append([name, f"{ours['ms']:.3f}", other, speedup, rate])
    shape = rows[0]["shape"]
    tokens = f"{shape['num_tokens']:,} tokens in sequences of {shape['sequence']:,}"
    measured = f"{shape['name']} shape, r {shape['rank']}, {tokens}, {rows[0]['dtype']}"
    heads = ["operation", "ours ms", "torch ms", "speed-up", "GB/s or TFLOP/s"]
    return setting_of(rows, measured) + "\n\n" + table(heads, lines)


def chart(rows: list[tuple[Shown, Row]]) -> str:
    """Draw the training steps' tokens per second as horizontal bars, in SVG."""
    # room for the longest label in DejaVu Sans, the widest of the fonts that browsers fall back to
    width, left, longest, top, pitch, bar = 720, 312, 340, 92, 27, 18
    bottom = top + pitch * len(rows)
    row = rows[0][1]
    most = max(row["tokens_per_second"] for _, row in rows)
    versions = ", ".join(f"{name} {row[name]}" for name in VERSIONS if name in row)
    title = f"Training steps, tokens per second: {row['model'].partition(',')[0]}, one {row['gpu']}"
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 16}" '
        f'viewBox="0 0 {width} {bottom + 16}" role="img" font-family="{font}" '
        'font-size="12" fill="#1f2328">',
        f"<title>{escape(title)}</title>",
        # in a dark page too the text stands on white
        f'<rect width="{width}" height="{bottom + 16}" rx="6" fill="#ffffff"/>',
        f'<text x="20" y="30" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="20" y="50" fill="#59636e">{escape(versions)}</text>',
    ]
    x = 20
    for kind in (kind for kind in COLOURS if any(shown.kind == kind for shown, _ in rows)):
        out.append(f'<rect x="{x}" y="62" width="12" height="12" rx="2" fill="{COLOURS[kind]}"/>')
        out.append(f'<text x="{x + 18}" y="72">{LEGEND[kind]}</text>')
        x += 44 + 7 * len(LEGEND[kind])
    for index, (shown, row) in enumerate(rows):
        y, speed = top + pitch * index, row["tokens_per_second"]
        length = longest * speed / most
        label = escape(shown.label or shown.variant)
        out += [
            f'<text x="{left - 8}" y="{y + 13.2}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" '
            f'fill="{COLOURS[shown.kind]}"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 13.2}">{speed:,.0f}</text>',
        ]
    out.append(f'<path d="M{left} {top - 5}V{bottom - 4}" stroke="#59636e" fill="none"/>')
    return "\n".join([*out, "</svg>", ""])


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """Put each block between its markers; end the program where these are not there once each."""
    markers = {name: (f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in blocks}
    wrong = [
        f"  {marker} (found {text.count(marker)} times)"
        for pair in markers.values()
        for marker in pair
        if text.count(marker) != 1
    ]
    wrong += [f"  {end} stands before {begin}" for begin, end in markers.values()
              if not wrong and text.index(end) < text.index(begin)]  # fmt: skip
    if wrong:
        hint = "hint: each must stand once in it, on a line of its own"
        sys.exit("\n".join([f"{README}: the markers of the tables are wrong:", *wrong, hint]))
    for name, (begin, end) in markers.items():
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{blocks[name]}\n\n{end}{after}"
    return text


def main() -> None:
    """Write the tables and the chart, or compare them with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if they differ")
    arguments = parser.parse_args()
    measured = {
        row["variant"]: row
        for row in newest(TRAINING_STEP, lambda row: row["variant"], "kernel_seconds")
    }
    steps = [(shown, measured[shown.variant]) for shown in VARIANTS if shown.variant in measured]
    if not steps:
        sys.exit(
            f"{TRAINING_STEP}: no row of a variant shown here that has kernel_seconds\n"
            "hint: python kernels/benchmarks/benchmark_training_step.py"
        )
    operations = newest(OPERATIONS, lambda row: (row["operation"], row["provider"]), "provider")
    blocks = {
        "training-step": training_table(steps),
        "operations": operations_table(operations),
    }
    wanted = {README: with_blocks(README.read_text("utf-8"), blocks), CHART: chart(steps)}
    differing = [
        path for path, text in wanted.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]  # fmt: skip
    if arguments.check and differing:
        names = ", ".join(str(path) for path in differing)
        sys.exit(f"not what the rows give: {names}\nhint: python kernels/benchmarks/make_tables.py")
    for path in differing:
        path.write_text(wanted[path], "utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
