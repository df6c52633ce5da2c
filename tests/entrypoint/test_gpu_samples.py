"""Which GPUs belong to the job, out of those that nvidia-smi lists."""

from __future__ import annotations

import pytest

from lora_train.gpu_samples import Gpu, parse_list, select_gpus

A, B = Gpu("0", "A100", "GPU-aaaa"), Gpu("1", "A100", "GPU-bbbb")
SPLIT = Gpu("1", "A100", "GPU-bbbb", (("MIG 1g.10gb", "MIG-cccc"), ("MIG 1g.10gb", "MIG-dddd")))


class TestWhichGpus:
    @pytest.mark.parametrize(
        ("job", "visible", "expected"),
        [
            (None, None, [A, B]),
            ("1", "0", [B]),
            # device cgroups: the job has the node's GPUs 1 and 2, seen as 0 and 1
            ("1,2", "0,1", [A, B]),
            ("2,3", "1", [B]),
            (None, "1", [B]),
            (None, "GPU-bb", [B]),
            (None, "GPU-bbbb,GPU-aaaa", [A, B]),
            (None, "0,7", [A, B]),
            ("0", "", [A]),
            (None, "NoDevFiles", [A, B]),
        ],
    )
    def test_by_variables(self, job: str | None, visible: str | None, expected: list[Gpu]) -> None:
        named = {"SLURM_JOB_GPUS": job, "CUDA_VISIBLE_DEVICES": visible}
        environment = {name: value for name, value in named.items() if value is not None}
        assert select_gpus([A, B], environment) == expected

    def test_further_nodes_inherit_numbers_of_the_first(self) -> None:
        variables = {"SLURM_JOB_GPUS": "0", "CUDA_VISIBLE_DEVICES": "1", "SLURM_NODEID": "1"}
        assert select_gpus([A, B], variables) == [B]

    @pytest.mark.parametrize("visible", ["MIG-dddd", "MIG-GPU-bbbb/3/0"])
    def test_slices(self, visible: str) -> None:
        # Slurm counts slices: 0 is the first slice, not the first GPU
        variables = {"SLURM_JOB_GPUS": "0", "CUDA_VISIBLE_DEVICES": visible}
        assert select_gpus([A, SPLIT], variables) == [SPLIT]

    def test_the_list(self) -> None:
        lines = [
            "GPU 0: A100 (UUID: GPU-aaaa)",
            "GPU 1: A100 (UUID: GPU-bbbb)",
            "  MIG 1g.10gb     Device  0: (UUID: MIG-cccc)",
            "  MIG 1g.10gb     Device  1: (UUID: MIG-dddd)",
            "Unable to determine the device handle for gpu 0000:3B:00.0: GPU is lost.",
        ]
        assert parse_list(lines) == [A, SPLIT]
