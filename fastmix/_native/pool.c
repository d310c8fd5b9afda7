/* The thread pool. Workers are made when they are first wanted, and sleep on a condition variable while there is nothing to do: nothing
 * spins beside torch's own threads. A caller works too, so a job ends even if no worker wakes up. Several callers may have jobs at
 * once. A forked child begins with an empty pool. Workers are detached: the process may end at any time. */
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "common.h"

enum { MOST_WORKERS = 256 };

typedef struct job {
    fm_task task;
    void *arg;
    int64_t chunks;
    atomic_llong next;
    int wanted;  /* workers that may still join */
    int working; /* workers that have joined and not left */
    fenv_t environment; /* of the caller: rounding and denormals are the same in every thread */
    pthread_cond_t left;
    struct job *after;
} job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static job *jobs; /* those that may have chunks left */
static int workers;

static void run(job *j) {
    for (;;) {
        int64_t chunk = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (chunk >= j->chunks) return;
        j->task(j->arg, chunk);
    }
}

static void *worker(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        job *j = jobs;
        while (j && !j->wanted) j = j->after;
        if (!j) {
            pthread_cond_wait(&work, &lock);
            continue;
        }
        j->wanted--;
        j->working++;
        pthread_mutex_unlock(&lock);
        fesetenv(&j->environment);
        run(j);
        pthread_mutex_lock(&lock);
        if (--j->working == 0) pthread_cond_signal(&j->left);
    }
    return NULL;
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void in_parent(void) { pthread_mutex_unlock(&lock); }
static void in_child(void) {
    static const pthread_mutex_t free_lock = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t no_waiter = PTHREAD_COND_INITIALIZER;
    lock = free_lock;
    work = no_waiter;
    jobs = NULL;
    workers = 0;
}
static void watch_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

/* Makes workers until there are `count`, as far as the system lets it. Called with the lock. */
static void make_workers(int count) {
    sigset_t all, before;
    pthread_attr_t detached;
    if (workers >= count || pthread_attr_init(&detached)) return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for Python's threads */
    while (workers < count) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, worker, NULL)) break;
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
}

void fm_parallel(fm_task task, void *arg, int64_t chunks, int threads) {
    int64_t helpers = fm_min(fm_min(threads, chunks) - 1, MOST_WORKERS);
    if (helpers <= 0) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) task(arg, chunk);
        return;
    }
    job j = {.task = task, .arg = arg, .chunks = chunks, .wanted = (int)helpers};
    atomic_init(&j.next, 0);
    fegetenv(&j.environment);
    pthread_cond_init(&j.left, NULL);
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&lock);
    make_workers((int)helpers);
    j.after = jobs;
    jobs = &j;
    for (int64_t n = 0; n < helpers; n++) pthread_cond_signal(&work);
    pthread_mutex_unlock(&lock);
    run(&j);
    pthread_mutex_lock(&lock);
    job **at = &jobs;
    while (*at != &j) at = &(*at)->after;
    *at = j.after;
    while (j.working) pthread_cond_wait(&j.left, &lock);
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&j.left);
}

/* For the test of the pool: counts how often each chunk ran. */
static void count_chunk(void *arg, int64_t chunk) { ((int32_t *)arg)[chunk]++; }

FASTMIX_EXPORT void fm_count_chunks(int32_t *counts, int64_t chunks, int32_t threads) {
    fm_parallel(count_chunk, counts, chunks, threads);
}
