"""Plots drawn with matplotlib: as PNG files, and as SVG whose colours the page's style decides."""

from __future__ import annotations

import html
import io
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_train.paths import cache_dir
from lora_train.report import formats
from lora_train.report.plots import Bars, Line, Plot
from lora_train.report.time_split import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SERIES = 8
# inches; on the page about as many CSS pixels as hundredths
_SIZE = (3.7, 2.35)
_PNG_DPI = 220
_MOST_IN_LEGEND = 4
# a curve with more points shows its shape; what each one is, nobody can point at
_MOST_TOOLTIPS = 120
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Palette:
    """The colours of a drawing."""

    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


# Okabe and Ito's, which people tell apart who see no red or no green; the yellow is too light
PRINT = Palette(
    "#1b1f24", "#57606a", "#e3e6ea",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#444444"),
)  # fmt: skip
# stand-ins, which the SVG of a page has replaced by the variables of its style
_PLACES = Palette("#0000a0", "#0000a1", "#0000a2", tuple(f"#0000b{n}" for n in range(NUM_SERIES)))
_VARIABLES = {
    _PLACES.text: "var(--text)",
    _PLACES.muted: "var(--muted)",
    _PLACES.grid: "var(--grid)",
    **{place: f"var(--series-{n})" for n, place in enumerate(_PLACES.series)},
}


def to_png(plot: Plot | Bars) -> bytes:
    """Draw a plot for slides and print, with its title, on white."""
    return _draw(plot, PRINT, "png", has_title=True, dpi=_PNG_DPI, facecolor="white")[0]


def to_svg(plot: Plot | Bars) -> str:
    """Draw a plot for the page: an <svg> without a size, which takes the width that there is.

    Args:
        plot: what to draw.

    Returns:
        The element, with colours by CSS variables, and a tooltip at each point where there are
        few.
    """
    no_date = {"Date": None, "Creator": None}
    drawn, axes = _draw(plot, _PLACES, "svg", has_title=False, metadata=no_date)
    text = drawn.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = (float(each) for each in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    label = html.escape(plot.title)
    text = re.sub(
        r"<svg[^>]*>",
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">',
        text,
        count=1,
    )
    # several drawings on one page: each its own names
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"#0000[ab]\d", lambda match: _VARIABLES[match[0]], text)
    if isinstance(plot, Plot):
        text = text.replace("</svg>", f"{_tooltips(plot, axes, height)}</svg>")
    return text.strip()


def _draw(
    plot: Plot | Bars, palette: Palette, kind: str, *, has_title: bool, **options: Any
) -> tuple[bytes, Axes]:
    """Draw a plot as a file of some kind; return that, and the axes as they lie in it."""
    # it keeps a list of the machine's fonts, by default in $HOME
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours: dict[Any, Any] = {
        "text.color": palette.text,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.grid,
        "xtick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "grid.color": palette.grid,
    }
    with mpl.rc_context({**_SETTINGS, **colours, "svg.hashsalt": plot.name}):
        width, height = _SIZE
        if isinstance(plot, Bars):
            height = max(height, 1.3 + 0.2 * len(plot.runs))
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(has_title)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        if isinstance(plot, Bars):
            _draw_bars(axes, plot, palette)
        else:
            # the page has one for many runs, above all drawings
            has_legend = has_title or len(plot.lines) <= _MOST_IN_LEGEND
            _draw_curves(axes, plot, palette, has_legend=has_legend)
        if has_title:
            figure.suptitle(plot.title, x=0.01, ha="left", fontsize=9, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)  # ticks are made, with these settings, here
    return buffer.getvalue(), axes


def _draw_curves(axes: Axes, plot: Plot, palette: Palette, *, has_legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(visible=True, axis="y", linewidth=0.7)
    for begin, end in plot.spans:
        # seen also where it took a moment of a long run
        axes.axvspan(begin, end, color=palette.series[1], alpha=0.25, linewidth=0.8)
    for line in plot.lines:
        _draw_line(axes, line, palette)
    if plot.level is not None:
        value, label = plot.level
        axes.axhline(value, color=palette.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", color=palette.muted, fontsize=7,
        )  # fmt: skip
    if plot.is_log:
        axes.set_yscale("log")
    elif plot.from_zero:
        axes.set_ylim(bottom=0)
    if plot.top is not None:
        axes.set_ylim(top=plot.top * 1.04)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=plot.x_label == "step"))
    if not plot.is_log:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        # its own way, a factor above the axis, would stand where the legend does
        axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
    if plot.marks:
        axes.plot(
            plot.marks, np.zeros(len(plot.marks)), "|", color=palette.text, markersize=6,
            transform=axes.get_xaxis_transform(), clip_on=False, label="checkpoint",
        )  # fmt: skip
    if plot.spans:
        axes.fill_between([], [], [], color=palette.series[1], alpha=0.4, label="validation")
    handles, labels = axes.get_legend_handles_labels()
    if has_legend and len(labels) > 1:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
            ncols=_legend_columns(labels),
            borderaxespad=0.2, borderpad=0, handlelength=1.2, columnspacing=1, handletextpad=0.4,
            fontsize=7, labelcolor=palette.muted,
        )  # fmt: skip


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.5g}".replace("e-0", "e-")


def _legend_columns(labels: list[str]) -> int:
    """As many as fit beside each other, counted in letters."""
    if sum(len(label) + 5 for label in labels) <= 64:
        return max(1, len(labels))
    return max(1, 60 // (max(map(len, labels)) + 5))


def _draw_line(axes: Axes, line: Line, palette: Palette) -> None:
    colour = palette.series[line.series % NUM_SERIES]
    # the ninth curve has the first one's colour
    dash: Any = "-" if line.series < NUM_SERIES else (0, (3, 2))
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    if line.style == "raw":
        axes.plot(line.x, line.y, color=colour, alpha=0.35, linewidth=0.8, label=line.label)
        return
    # a single point makes no line
    has_dots = line.style == "points" or np.isfinite(line.y).sum() == 1
    axes.plot(
        line.x, line.y, color=colour, linewidth=1.5, linestyle=dash, label=line.label or None,
        marker="o" if has_dots and len(line.x) <= 60 else None, markersize=3,
    )  # fmt: skip


def _draw_bars(axes: Axes, bars: Bars, palette: Palette) -> None:
    left = np.zeros(len(bars.runs))
    for place, (kind, shares) in enumerate(bars.shares.items()):
        if max(shares) > 0:
            axes.barh(
                bars.runs, [100 * share for share in shares], left=left, height=0.5,
                color=palette.series[place % NUM_SERIES], label=NAMES[kind],
            )  # fmt: skip
        left = left + 100 * np.array(shares)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel("% of the wall time since the first start")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=6.5,
        handlelength=0.9, labelcolor=palette.muted,
    )  # fmt: skip


def _tooltips(plot: Plot, axes: Axes, height: float) -> str:
    """Invisible circles over the points, each of which says what it is."""
    circles = []
    for line in plot.lines:
        if line.style == "raw" or len(line.x) > _MOST_TOOLTIPS:
            continue
        for x, y in zip(line.x, line.y, strict=True):
            if not math.isfinite(y):
                continue
            # pixels at 100 dots an inch, from below -> points, from above
            place = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
            circles.append(
                f'<circle cx="{place[0]:.1f}" cy="{height - place[1]:.1f}" r="4">'
                f"<title>{html.escape(_describe(plot, line, x, y))}</title></circle>"
            )
    return f'<g fill="transparent">{"".join(circles)}</g>'


def _describe(plot: Plot, line: Line, x: float, y: float) -> str:
    where = f"step {x:.0f}" if plot.x_label == "step" else f"{x:.2f} {plot.x_label.split()[-1]}"
    label = f"{line.label}: " if line.label else ""
    return f"{where}\n{label}{formats.small(y) if y < 1000 else formats.fixed(y, 0)} {plot.y_label}"
