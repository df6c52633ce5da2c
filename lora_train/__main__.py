"""`python -m lora_train`: the console script, as `launcher` starts the processes of a run."""

from __future__ import annotations

import sys

from lora_train.cli import main

sys.exit(main())
