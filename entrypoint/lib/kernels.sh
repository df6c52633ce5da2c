# The compiled Triton kernels that come with the image (`lora_train.precompile`), for the first step.
# shellcheck shell=bash

# Only the index of each kernel and Triton's own helper are copied: the indexes name the code inside the
# image. Inductor, which lora-train does not use, has nothing to be seeded with.
seed_kernels() {
  local seeds=$image/triton_cache
  [ -d "$seeds" ] || return 0
  # another run may copy at the same time: an index read half is no index, and Triton compiles
  (cd "$seeds" && cp -rn --parents -- */__grp__*.json */*.so "$TRITON_CACHE_DIR/") 2>/dev/null
  return 0
}
