/* Preloaded, it shows a process the time of day CLOCK_AHEAD_S seconds later; how long things take stays true.

   Deadlines go to the kernel by the kernel's clock: Python, Abseil and the C++ library wait until a time of day. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)

static long ahead(void) {
    const char *given = getenv("CLOCK_AHEAD_S");
    return given ? atol(given) : 0;
}

static struct timespec kernels(const struct timespec *shown) {
    struct timespec until = *shown;
    until.tv_sec -= ahead();
    return until;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int failed = next(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec shown;
    clock_gettime(CLOCK_REALTIME, &shown);
    *now = (struct timeval){shown.tv_sec, shown.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *now) {
    struct timespec shown;
    clock_gettime(CLOCK_REALTIME, &shown);
    if (now) *now = shown.tv_sec;
    return shown.tv_sec;
}

int sem_timedwait(sem_t *waits, const struct timespec *shown) {
    NEXT(sem_timedwait);
    struct timespec until = kernels(shown);
    return next(waits, &until);
}

int pthread_cond_timedwait(pthread_cond_t *waits, pthread_mutex_t *mutex, const struct timespec *shown) {
    static __typeof__(pthread_cond_timedwait) *next;
    if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (shown->tv_sec < 1000000000) return next(waits, mutex, shown); /* seconds since the start, no time of day */
    struct timespec until = kernels(shown);
    return next(waits, mutex, &until);
}

long syscall(long number, ...) {
    NEXT(syscall);
    long a[6];
    va_list given;
    va_start(given, number);
    for (int place = 0; place < 6; place++) a[place] = va_arg(given, long);
    va_end(given);
    struct timespec until;
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        until = kernels((struct timespec *)a[3]);
        a[3] = (long)&until;
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
