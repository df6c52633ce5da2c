"""Print what the image is made of, one fact a line, for image.json: `describe_image.py` in it."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata

import torch

from lora_train import __version__

# get_arch_list() answers only where there is a GPU
architectures = torch._C._cuda_getArchFlags() if torch.version.cuda else None
print(
    json.dumps(
        {
            "version": __version__,
            "commit": os.environ.get("COMMIT") or "unknown",
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "base": os.environ.get("BASE_IMAGE") or "unknown",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "gpus": architectures or "none",
            "packages": sorted(
                f"{package.name}=={package.version}" for package in metadata.distributions()
            ),
        },
        indent=1,
    )
)
