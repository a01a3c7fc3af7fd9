/* For LD_PRELOAD: every two seconds the wall clock steps from a day ahead to a day behind, or back. Monotonic clocks run on. */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t jump(void) {
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  return now.tv_sec / 2 % 2 ? 86400 : -86400;
}

int clock_gettime(clockid_t clock, struct timespec* out) {
  const int failed = (int)syscall(SYS_clock_gettime, clock, out);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) out->tv_sec += jump();
  return failed;
}

int gettimeofday(struct timeval* restrict out, void* restrict zone) {
  const int failed = (int)syscall(SYS_gettimeofday, out, zone);
  if (!failed && out) out->tv_sec += jump();
  return failed;
}

time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
