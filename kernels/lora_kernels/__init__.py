"""Fused LoRA for transformers: Triton kernels, one operation a file, and the bridge to PEFT.

`peft_bridge.fuse(model)` is the door. Everything but the files `peft_*.py` needs torch and triton
only, and nothing here knows `lora_train`. `reference.py` and `reference_decoder.py` are the plain
torch truth of tests, benchmarks and the check before training.
"""
