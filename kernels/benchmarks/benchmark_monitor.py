"""What the GPU monitor costs: CPU time of it and of its source, at the start and in each second.

    benchmark_monitor.py [--seconds 60] [--output FILE]

A row of JSON for nvidia-smi and one for NVML go to results/monitor.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cpu_seconds(process: int) -> float:
    """CPU time of a process and its children so far; the scheduler counts in nanoseconds."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    times = [Path(f"/proc/{each}/schedstat").read_text() for each in (str(process), *children)]
    return sum(int(text.split()[0]) for text in times) / 1e9


def watch(seconds: float, path: str) -> dict[str, Any]:
    """Run the monitor; return what it takes to start, and in each second after."""
    with tempfile.TemporaryDirectory() as state:
        Path(state, "run_directory").write_text(f"{state}\n")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_train.gpu_monitor"],
            env={**os.environ, "LORA_STATE_DIR": state, "PATH": path},
        )
        time.sleep(4)
        start = cpu_seconds(process.pid)
        time.sleep(seconds)
        used = cpu_seconds(process.pid) - start
        process.terminate()
        process.wait()
        rows = len(Path(state, "gpu_memory_log.csv").read_text().splitlines()) - 1
    return {
        "rows": rows,
        "cpu_seconds_to_start": round(start, 4),
        "share_of_a_core": round(used / seconds, 7),
    }


def main() -> None:
    """Measure nvidia-smi as the source, then NVML."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, default=HERE / "results/monitor.jsonl")
    options = parser.parse_args()
    import torch

    for source, path in (("nvidia-smi", os.environ["PATH"]), ("NVML", "/nonexistent")):
        row = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": os.environ.get("COMMIT", "unknown"),
            "source": source,
            "seconds": options.seconds,
            **watch(options.seconds, path),
        }
        print(json.dumps(row), flush=True)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
