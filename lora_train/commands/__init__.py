"""The commands of `lora-train`, one module each, with `run(argv) -> exit status`."""
