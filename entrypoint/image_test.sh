#!/usr/bin/env bash
# What must hold in every image, on a builder without a GPU: `apptainer test`, `make image-test`.
set -euo pipefail
readonly image=/opt/lora

check() { # WHAT COMMAND...
  local what=$1 output
  shift
  output=$("$@" 2>&1) || {
    printf 'FAILED: %s\n%s\n' "$what" "$output" >&2
    exit 1
  }
  printf 'ok: %s\n' "$what"
}

check 'the packages import' "$image/venv/bin/python" -c \
  'import accelerate, bitsandbytes, datasets, lora_kernels, lora_train, peft, pynvml, torch, transformers, triton'
check 'torch has kernels for A100 and Hopper, or is the CPU build' grep -Eq \
  '"gpus": "(none|.*sm_80.* sm_90.*)"' "$image/image.json"
check 'Triton can build what it needs at run time' bash -c \
  "printf '#include <Python.h>\\n' | gcc -fsyntax-only -I\"\$($image/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')\" -x c -"
check 'compiled kernels are there' bash -c "ls $image/triton_cache/*/__grp__*.json >/dev/null"
check 'the embedded model and data are there' ls \
  "$image/venv/share/lora-train/quickstart/smollm2-135m-instruct/model.safetensors" \
  "$image/venv/share/lora-train/quickstart/us-addresses/train.jsonl"
check 'the command answers' "$image/bin/lora-train" --version
check 'the default run is a valid one' "$image/bin/lora-train" --dry-run
check 'so is a line of NeMo' "$image/bin/nemo" llm finetune --factory llama31_8b --dryrun
check 'no build leftovers' bash -c "[ -z \"\$(ls -d $image/src $image/tmp 2>/dev/null)\" ]"
