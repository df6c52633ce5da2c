"""Memory and time that loading a base model takes: nf4 on one GPU, or shards over several.

    benchmark_loading.py [--layers N] [--folder FOLDER] [--quantization nf4|none] [--output FILE]
    torchrun --nproc-per-node 4 benchmark_loading.py --quantization none [...]

Makes a checkpoint with layers of Llama-3.1-70B's shape (1.7 GB each, all with the same random
weights; embedding and head 4.2 GB) if FOLDER has none, loads it by `load_base_model` and prints a
row of JSON for each process. What grows with the number of layers shows with two of them. Host
memory is RssAnon, which has to be there, and RssFile (RssShmem in /dev/shm), pages of the files,
which the kernel takes back when it needs room.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed
from transformers import LlamaConfig

from lora_train.config import Config, DataConfig, ModelConfig, TrainerConfig
from lora_train.device import select_device
from lora_train.model import load_base_model
from lora_train.model_size import linear_shapes
from lora_train.sharding import make_mesh

_INTERVAL_SECONDS = 0.01
_NUM_WRITERS = 8


def make_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Write config.json and one file of weights for each layer, unless they are there."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    hidden = config.hidden_size
    shapes = linear_shapes(config.to_dict())
    assert shapes is not None

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02)

    names = ("lm_head", "model.embed_tokens")
    ends = {f"{name}.weight": weight(config.vocab_size, hidden) for name in names}
    ends["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(ends, folder / "ends.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(ends, "ends.safetensors")
    layer = {name: weight(rows, columns) for name, (columns, rows) in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer[norm] = torch.ones(hidden, dtype=torch.bfloat16)

    def write_some(first: int) -> None:
        for number in range(first, config.num_hidden_layers, _NUM_WRITERS):
            weights = {f"model.layers.{number}.{name}.weight": each for name, each in layer.items()}
            save_file(weights, folder / _layer_file(number), metadata={"format": "pt"})

    # forked: they share the layer's weights
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(first,)) for first in range(_NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for number in range(config.num_hidden_layers):
        for name in layer:
            places[f"model.layers.{number}.{name}.weight"] = _layer_file(number)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _layer_file(number: int) -> str:
    return f"layer-{number:03d}.safetensors"


class HostMemory:
    """The peaks of this process's memory while the block runs."""

    def __enter__(self) -> HostMemory:
        """Begin to look."""
        self._before, self._peaks = self._read(), self._read()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *reason: Any) -> None:
        """Stop looking."""
        self._is_done.set()
        self._thread.join()

    def gib(self) -> dict[str, float]:
        """Return the peaks in GiB, and what was there before."""
        return {f"host_{name}_peak_gib": round(kib / 2**20, 2) for name, kib in self._peaks.items()}

    def before_gib(self) -> float:
        """Return what the program took before, without pages of files, in GiB."""
        return round(self._before["anon"] / 2**20, 2)

    def _watch(self) -> None:
        while not self._is_done.wait(_INTERVAL_SECONDS):
            self._peaks = {name: max(kib, self._peaks[name]) for name, kib in self._read().items()}

    @staticmethod
    def _read() -> dict[str, int]:
        text = Path("/proc/self/status").read_text()
        found = dict(re.findall(r"^Rss(Anon|File|Shmem):\s+(\d+)", text, re.MULTILINE))
        return {name.lower(): int(kib) for name, kib in found.items()}


def main() -> None:
    """Load once, in this process or in all that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/loading_70b"))
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--hidden-size", type=int, default=8192)
    parser.add_argument("--intermediate-size", type=int, default=28672)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--output", type=Path, help="file that the rows are appended to")
    options = parser.parse_args()
    is_first = os.environ.get("RANK", "0") == "0"
    sizes = (options.layers, options.hidden_size, options.intermediate_size, options.vocab_size)
    folder = options.folder / "_".join(map(str, sizes))
    model_config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 128,
        num_key_value_heads=8,
        vocab_size=options.vocab_size,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    if is_first:
        make_checkpoint(folder, model_config)
    device = select_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        distributed.barrier()
    config = Config(
        model=ModelConfig(
            path=str(folder),
            quantization=None if options.quantization == "none" else options.quantization,
        ),
        data=DataConfig(path="none"),
        trainer=TrainerConfig(strategy="fsdp2" if "RANK" in os.environ else "ddp"),
    )
    dtype = torch.bfloat16
    mesh = make_mesh(config, device, dtype)
    row: dict[str, Any] = {
        "quantization": options.quantization,
        "processes": 1 if mesh is None else mesh.size(),
        "layers": options.layers,
        "checkpoint_gib": round(sum(f.stat().st_size for f in folder.iterdir()) / 2**30, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    with HostMemory() as host:
        begun = time.perf_counter()
        model = load_base_model(config.model, dtype, device, mesh)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row["seconds"] = round(time.perf_counter() - begun, 1)
    row |= {"host_anon_before_gib": host.before_gib(), **host.gib()}
    if device.type == "cuda":
        row |= {
            "gpu_gib": round(torch.cuda.memory_allocated(device) / 2**30, 2),
            "gpu_peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
            "gpu_reserved_peak_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2),
        }
    assert model is not None
    line = json.dumps(row)
    print(line, flush=True)
    if options.output is not None:
        with options.output.open("a") as stream:
            stream.write(line + "\n")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
