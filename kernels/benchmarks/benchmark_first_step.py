"""From the start of the program to the first training step, with and without compiled kernels.

    benchmark_first_step.py [--seeds FOLDER] [--repeats N] [--output FILE] [WORD ...]

Runs `lora-train WORDS` (the quickstart when none are given) in turn with an empty Triton cache and
with one that is seeded from FOLDER (`python -m lora_train.precompile FOLDER`) as the image's
entrypoint does it. A row of JSON for each run goes to results/first_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# what follows the first step is not looked at
SHORT = (
    "--max-steps", "2", "eval.num_generate=0", "trainer.limit_val_batches=0", "log.trackers=[]",
)  # fmt: skip
PROGRAM = "import sys; from lora_train.cli import main; sys.exit(main())"
COUNT = re.compile(r"kernels: (\d+) from the cache, (\d+) compiled(?: in ([\d.]+) s)?")


def seed(seeds: Path, cache: Path) -> None:
    """Do what entrypoint/lib/kernels.sh does."""
    for file in [*seeds.glob("*/__grp__*.json"), *seeds.glob("*/*.so")]:
        (cache / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, cache / file.parent.name)


def timed_run(words: list[str], seeds: Path | None) -> dict[str, Any]:
    """Run once in an empty place; return what was measured."""
    with tempfile.TemporaryDirectory() as place:
        cache, runs = Path(place, "triton"), Path(place, "runs")
        cache.mkdir()
        begun = time.perf_counter()
        if seeds is not None:
            seed(seeds, cache)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, *words, *SHORT, f"log.log_dir={runs}"],
            env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until_step = None
        while process.poll() is None and until_step is None:
            if any('"step": 1' in file.read_text() for file in runs.glob("*/metrics.jsonl")):
                until_step = time.perf_counter() - begun
            time.sleep(0.01)
        _, errors = process.communicate()
        count = COUNT.search(errors)
        if process.returncode != 0 or until_step is None or count is None:
            raise SystemExit(f"the run failed:\n{errors[-4000:]}")
        return {
            "seconds_to_first_step": round(until_step, 2),
            "kernels_from_cache": int(count[1]),
            "kernels_compiled": int(count[2]),
            "seconds_compiling": float(count[3] or 0),
        }


def main() -> None:
    """Measure both in turn, so that neither has the warmer disk."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=Path, default=Path("/opt/lora/triton_cache"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results/first_step.jsonl")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    import torch

    facts = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMMIT", "unknown"),
        **{name: metadata.version(name) for name in ("torch", "triton", "transformers", "peft")},
        "words": " ".join(options.words) or "(quickstart)",
    }
    timed_run(options.words, None)  # the first of all reads the packages from the disk
    for _ in range(options.repeats):
        for name, seeds in (("empty cache", None), ("seeded cache", options.seeds)):
            row = {**facts, "variant": name, **timed_run(options.words, seeds)}
            print(json.dumps(row), flush=True)
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
