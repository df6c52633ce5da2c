"""Print the labels of the SIF, which `apptainer inspect` shows, from image.json."""

from __future__ import annotations

import json
from pathlib import Path

image = json.loads((Path(__file__).parent.parent / "image.json").read_text())
print("org.opencontainers.image.version", image["version"])
print("org.opencontainers.image.revision", image["commit"])
print("org.opencontainers.image.created", image["built"])
print("org.opencontainers.image.base.name", image["base"])
print("lora-train.python", image["python"])
print("lora-train.cuda", image["cuda"])
print("lora-train.gpus", image["gpus"])
print("lora-train.packages", " ".join(image["packages"]))
