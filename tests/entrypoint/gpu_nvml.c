/* Stands in for libnvidia-ml.so.1. What is not here pynvml takes for missing in an old driver.
 * FAKE_NVML: what nvmlInit returns: 0 works, 12 no library, 18 another version than the kernel's. */
#include <stdio.h>
#include <stdlib.h>

typedef void *device;

int nvmlInitWithFlags(unsigned flags) {
  char *status = getenv("FAKE_NVML");
  return status ? atoi(status) : 12;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
const char *nvmlErrorString(int status) {
  return status == 18 ? "RM has detected an NVML/RM version mismatch." : "Error";
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *gpu) {
  *gpu = (device)(long)(index + 1);
  return index < 2 ? 0 : 2;
}
int nvmlDeviceGetName(device gpu, char *text, unsigned size) {
  snprintf(text, size, (long)gpu > 9 ? "NVIDIA A100-SXM4-80GB MIG 3g.40gb" : "NVIDIA A100-SXM4-80GB");
  return 0;
}
int nvmlDeviceGetUUID(device gpu, char *text, unsigned size) {
  static const char *uuids[] = {"GPU-aaaa", "GPU-bbbb"};
  snprintf(text, size, (long)gpu > 9 ? "MIG-aaaa" : "%s", uuids[((long)gpu - 1) % 2]);
  return 0;
}
/* only the second GPU is split, into one slice in its second place */
int nvmlDeviceGetMigMode(device gpu, unsigned *now, unsigned *later) {
  *now = *later = (long)gpu == 2 && getenv("FAKE_MIG");
  return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(device gpu, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(device gpu, unsigned place, device *slice) {
  *slice = (device)10L;
  return place == 1 ? 0 : 6;
}
int nvmlDeviceGetUtilizationRates(device gpu, unsigned *rates) {
  rates[0] = 50 + (long)gpu;
  return 0;
}
int nvmlDeviceGetMemoryInfo(device gpu, unsigned long long *memory) {
  memory[0] = 81920ULL << 20;
  memory[2] = 1024ULL << 20;
  return 0;
}
int nvmlDeviceGetPowerUsage(device gpu, unsigned *milliwatts) { *milliwatts = 200500; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(device gpu, unsigned long long *reasons) {
  *reasons = 1;
  return 0;
}
