/* A stand-in for libnvidia-ml.so.1. FAKE_GPUS holds one word per GPU, such as 8.0,0,-1 7.0,3,2:
 * compute capability, GiB in use, MIG instances (-1: not in MIG mode). FAKE_NVML_INIT is what
 * nvmlInit returns (9: driver not loaded); FAKE_NVML_HANGS makes it wait. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int major, minor, used, instances; } Gpu;
typedef unsigned long long Bytes;

static Gpu gpus[16];
static int num_gpus;

/* handles: GPU i is i + 1, its instance j is 100 * (i + 1) + j + 1 */
static long gpu_of(void *handle) { long h = (long)handle; return (h >= 100 ? h / 100 : h) - 1; }
static int instance_of(void *handle) { return (int)((long)handle % 100) - 1; }
static int is_instance(void *handle) { return (long)handle >= 100; }

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  if (getenv("FAKE_NVML_HANGS")) sleep(60);
  char *code = getenv("FAKE_NVML_INIT");
  if (code) return atoi(code);
  char *words = strdup(getenv("FAKE_GPUS") ? getenv("FAKE_GPUS") : "");
  num_gpus = 0;
  for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) {
    Gpu *gpu = &gpus[num_gpus++];
    sscanf(word, "%d.%d,%d,%d", &gpu->major, &gpu->minor, &gpu->used, &gpu->instances);
  }
  free(words);
  return 0;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  snprintf(text, size, "550.54.15");
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = num_gpus; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (void *)(long)(index + 1);
  return 0;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
  const char *whole = gpus[gpu_of(handle)].major < 8 ? "Tesla V100" : "NVIDIA A100";
  snprintf(text, size, "%s", is_instance(handle) ? "NVIDIA A100 MIG 1g.10gb" : whole);
  return 0;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
  if (is_instance(handle))
    snprintf(text, size, "MIG-%08ld-%04d", gpu_of(handle), instance_of(handle));
  else
    snprintf(text, size, "GPU-%08ld", gpu_of(handle));
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = gpus[gpu_of(handle)].major; *minor = gpus[gpu_of(handle)].minor; return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, Bytes *memory) {
  memory[0] = (is_instance(handle) ? 10ULL : 80ULL) << 30;
  memory[2] = is_instance(handle) ? 0 : (Bytes)gpus[gpu_of(handle)].used << 30;
  memory[1] = memory[0] - memory[2];
  return 0;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  *current = *pending = gpus[gpu_of(handle)].instances >= 0; return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
  (void)handle;
  *count = 7;
  return 0;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
  if ((int)index >= gpus[gpu_of(handle)].instances) return 6; /* not found */
  *instance = (void *)(100 * (gpu_of(handle) + 1) + index + 1);
  return 0;
}
