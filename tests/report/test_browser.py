"""The page in a real browser: nothing fails, nothing is fetched, nothing sticks out on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_train.report.findings import find_all
from lora_train.report.page import render

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium")

# the page's own policy forbids scripts in it: this one looks at it from outside
LOOK = """
<!DOCTYPE html><title>look</title>
<iframe id="page" style="border: 0; width: {width}px; height: 800px" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inner = document.getElementById("page").contentDocument;
  const boxes = [...inner.querySelectorAll("h1, p, dd, figure, svg, pre, .scroll, footer")];
  const found = {{
    width: inner.documentElement.scrollWidth,
    right: Math.max(...boxes.map((box) => box.getBoundingClientRect().right)),
    plots: boxes.filter((box) => box.matches("svg") && box.clientHeight > 100).length,
    fetched: inner.defaultView.performance.getEntriesByType("resource").length,
    background: getComputedStyle(inner.body).backgroundColor,
    text: getComputedStyle(inner.body).color,
    curve: getComputedStyle(inner.querySelector("svg [style*='--series-0']")).stroke,
    label: getComputedStyle(inner.querySelector("svg text")).fill,
  }};
  document.title = JSON.stringify(found);
}};
</script>
"""


def look(page: str, folder: Path, width: int, *, is_dark: bool) -> dict[str, Any]:
    """What the browser makes of a page in a window of this width."""
    folder.mkdir()
    file = folder / "look.html"
    file.write_text(LOOK.format(page=html.escape(page, quote=True), width=width))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
            # its own services find no way out either
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=5000",
            f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
            "--window-size=1400,900", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] != "look", done.stderr
    found = json.loads(html.unescape(title[1]))
    assert found["fetched"] == 0
    return found


@pytest.fixture
def page(sample_run: Callable[..., Any]) -> str:
    run = sample_run("a-long-name-of-a-run-" + 4 * "without-an-end-")
    run.add_gpu_log()
    sample = {"prompt": "x" * 300, "before": "{}", "after": "y", "reference": "z"}
    run.write("summary.json", {"steps": 120, "samples": [sample]})
    return render([find_all(run.folder)])


def test_one_run(page: str, tmp_path: Path) -> None:
    narrow = look(page, tmp_path / "narrow", 400, is_dark=False)
    assert narrow["width"] <= 400 and narrow["right"] <= 400
    assert narrow["plots"] == 9
    assert narrow["background"] == "rgb(255, 255, 255)"
    wide = look(page, tmp_path / "wide", 1280, is_dark=True)
    assert wide["width"] <= 1280 and wide["plots"] == 9
    dark = [int(number) for number in re.findall(r"\d+", wide["background"])]
    assert max(dark) < 40
    # the drawings follow: text is light, and the curve another blue than on white
    assert min(int(number) for number in re.findall(r"\d+", wide["label"])) > 120
    assert wide["curve"] != narrow["curve"]
    assert "rgb" in wide["curve"]


def test_several_runs(sample_run: Callable[..., Any], tmp_path: Path) -> None:
    runs = [sample_run(f"run-{n}", f"optim.lr={n}e-4", seed=n) for n in range(1, 7)]
    page = render([find_all(run.folder) for run in runs])
    narrow = look(page, tmp_path / "narrow", 400, is_dark=False)
    assert narrow["width"] <= 400 and narrow["right"] <= 400 and narrow["plots"] == 6
