/* For LD_PRELOAD: file systems that are not at hand. FAKE_FLOCK is `granted` (to everybody),
 * `hangs` or an errno; FAKE_FALLOCATE is an errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

int flock(int file, int operation) {
  (void)file; (void)operation;
  char *how = getenv("FAKE_FLOCK");
  if (!how || !strcmp(how, "granted")) return 0;
  if (!strcmp(how, "hangs")) sleep(60);
  errno = atoi(how);
  return -1;
}

int fallocate(int file, int mode, off_t start, off_t length) {
  (void)file; (void)mode; (void)start; (void)length;
  char *how = getenv("FAKE_FALLOCATE");
  if (!how) return 0;
  errno = atoi(how);
  return -1;
}
