"""Triton kernels for LoRA layers: fused forward and backward, one operation per file.

The package imports torch and triton only, never `lora_train`. The plain-torch reference of every
kernel will stand beside it and serve the tests, the benchmarks and the CPU path alike.
"""
