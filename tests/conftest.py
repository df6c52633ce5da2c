"""On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import os

import torch

# read when triton is imported, by whichever library comes first
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
