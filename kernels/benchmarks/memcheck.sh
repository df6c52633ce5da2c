#!/usr/bin/env bash
# Every kernel once under compute-sanitizer's memcheck, at sizes that are no multiple of any block.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${1:-python3}
SANITIZER=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [[ ! -x $SANITIZER ]]; then
  echo "memcheck: no compute-sanitizer here; it comes with the CUDA toolkit" >&2
  exit 2
fi
# torch's allocator would hide what lies between tensors
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec "$SANITIZER" --tool memcheck --error-exitcode 1 --leak-check no \
  "$PYTHON" kernels/benchmarks/run_each_kernel.py
