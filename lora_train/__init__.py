"""LoRA fine-tuning for Slurm clusters and laptops; the command is `lora-train`."""

__version__ = "0.1.0"
