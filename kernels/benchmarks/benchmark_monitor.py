"""What the GPU monitor costs: CPU time of it and of its source, over a minute and in it.

    benchmark_monitor.py [--seconds 60] [--output FILE]

A row of JSON for nvidia-smi and one for NVML go to results/monitor.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cpu_seconds(seconds: float, path: str) -> tuple[float, int]:
    """Run the monitor for so long; return the CPU time of it and its children, and its rows."""
    with tempfile.TemporaryDirectory() as state:
        Path(state, "run_directory").write_text(f"{state}\n")
        environment = {**os.environ, "LORA_STATE_DIR": state, "PATH": path}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_train.gpu_monitor"], env=environment
        )
        time.sleep(seconds)
        process.terminate()
        process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = len(Path(state, "gpu_memory_log.csv").read_text().splitlines()) - 1
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, rows


def main() -> None:
    """Measure a short time and a long one: their difference is what a run pays for each second."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, default=HERE / "results/monitor.jsonl")
    options = parser.parse_args()
    import torch

    for source, path in (("nvidia-smi", os.environ["PATH"]), ("NVML", "/nonexistent")):
        start, _ = cpu_seconds(2, path)
        whole, rows = cpu_seconds(2 + options.seconds, path)
        row: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": os.environ.get("COMMIT", "unknown"),
            "source": source,
            "rows": rows,
            "cpu_seconds_to_start": round(start, 3),
            "share_of_a_core": round((whole - start) / options.seconds, 6),
        }
        print(json.dumps(row), flush=True)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
