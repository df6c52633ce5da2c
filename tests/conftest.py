"""On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import os

import torch

# a report takes seconds; the tests of it turn it on
os.environ.setdefault("LORA_REPORT", "off")
# read when triton is imported, by whichever library comes first
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
