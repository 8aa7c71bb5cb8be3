/* Threads for one pass: the caller and its helpers run the same function, and meet at barriers.

   One pool serves the process; while it works for one caller, another works alone. Helpers spin for a moment
   before they sleep, since the next pass usually follows at once. The constants below were chosen on two cores of
   an AMD EPYC (Zen 4), with GPTs of 0.1, 0.8 and 10.7 million parameters; none of them changes a result. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum {
    /* The most threads of a pass. */
    MOST_THREADS = 64,
    /* Looks at a barrier before the core is offered to others at each look: 100 microseconds, longer than any wait
       between two threads that both have a core (a whole pass of 0.8M parameters takes 27 to 54). */
    SPINS_AT_A_BARRIER = 4000,
    /* Looks for the next pass before a helper sleeps: 8 milliseconds, nearly all of them looks that offer the core.
       To be woken takes from 22 microseconds to longer than a small pass, which therefore does not wait for it. */
    SPINS_BEFORE_SLEEP = 20000,
    /* Multiplications of a pass below which its helpers are not asked right after other work: one to two and
       a half milliseconds alone. A longer pass is worth the risk. */
    SHORT_PASS = 20000000,
    /* Multiplications that one thread makes in a nanosecond: 19 to 20 with weights in its cache, 8 without. */
    PER_NANOSECOND = 20,
};
enum {
    /* After so long without a pass the process has probably done other work, with OpenMP's threads, which spin for
       some milliseconds after it on the cores that the helpers need: a short pass then goes alone for a while. */
    OTHER_WORK_NS = 10000000,
    ALONE_AFTER_OTHER_WORK_NS = 5000000,
    /* A pass of which more than this, and more than the whole takes alone, was spent waiting had a helper whose
       core went to somebody else. */
    TOO_LONG_NS = 100000,
    /* Such a helper is not asked again for 2 ms, doubled with each failure up to 128 ms, and sleeps at once: on a
       machine whose cores are taken, passes then take about as long as with one thread. A turn on a core lasts some
       milliseconds, so that only after a longer time without a late helper the past is forgotten. */
    FIRST_REST_NS = 2000000,
    LONGEST_REST_NS = 128000000,
    FORGOTTEN_NS = 300000000,
};

struct meeting {
    atomic_long arrived, phase;
};
struct worker {
    struct meeting *meeting;
    int64_t number, of, waited; /* waited: nanoseconds, at all barriers of a pass */
};
typedef void task(struct worker *me, const void *model, const void *pass);

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

static void pause_a_little(long *spins) {
    if (++*spins < SPINS_AT_A_BARRIER) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    } else {
        sched_yield();
    }
}

static void barrier(struct worker *me) {
    struct meeting *here = me->meeting;
    if (me->of == 1) return;
    long phase = atomic_load(&here->phase), spins = 0;
    if (atomic_fetch_add(&here->arrived, 1) + 1 == me->of) {
        atomic_store(&here->arrived, 0);
        atomic_store(&here->phase, phase + 1);
    } else {
        int64_t since = nanoseconds();
        while (atomic_load(&here->phase) == phase) pause_a_little(&spins);
        me->waited += nanoseconds() - since;
    }
}

/* Which of `units` pieces of work are this worker's. */
static void share(const struct worker *me, int64_t units, int64_t *from, int64_t *to) {
    *from = units * me->number / me->of;
    *to = units * (me->number + 1) / me->of;
}

/* `job` is a counter times 128, plus how many take part. */
static struct {
    pthread_mutex_t busy, sleep;
    pthread_cond_t wake;
    long helpers;
    int64_t alone_until, rest; /* nanoseconds: when to ask for help again, and how long not to */
    int64_t ended, late;       /* when the last pass did, and when a helper was last waited for too long */
    atomic_long job, sleeping, resting, called; /* called: whether helpers are being woken, and none is there yet */
    struct meeting meeting;
    task *run;
    const void *model, *pass;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void *help(void *number) {
    struct worker me = {&pool.meeting, (int64_t)(intptr_t)number, 0, 0};
    long seen = 0, job;
    atomic_fetch_sub(&pool.sleeping, 1);
    for (;;) {
        long spins = 0;
        while ((job = atomic_load(&pool.job)) == seen && spins < SPINS_BEFORE_SLEEP && !atomic_load(&pool.resting))
            pause_a_little(&spins);
        if (job == seen) {
            pthread_mutex_lock(&pool.sleep);
            atomic_fetch_add(&pool.sleeping, 1);
            while ((job = atomic_load(&pool.job)) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
            atomic_fetch_sub(&pool.sleeping, 1);
            atomic_store(&pool.called, 0);
            pthread_mutex_unlock(&pool.sleep);
        }
        seen = job;
        me.of = job % 128;
        if (me.number < me.of) pool.run(&me, pool.model, pool.pass);
    }
    return 0;
}

/* A forked process has none of the threads. */
static void forget(void) {
    pthread_mutex_init(&pool.busy, 0);
    pthread_mutex_init(&pool.sleep, 0);
    pthread_cond_init(&pool.wake, 0);
    pool.helpers = 0;
    atomic_store(&pool.called, 0);
    atomic_store(&pool.job, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.meeting.arrived, 0);
}

static void hire(long wanted) {
    static int watching = 0;
    if (!watching) watching = !pthread_atfork(0, 0, forget);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the caller's threads */
    while (pool.helpers < wanted) {
        pthread_t thread;
        atomic_fetch_add(&pool.sleeping, 1); /* until it begins */
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)(pool.helpers + 1))) {
            atomic_fetch_sub(&pool.sleeping, 1);
            break;
        }
        pthread_detach(thread);
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* Run a task of about so many multiplications with up to `threads` threads, this one among them. */
static void run_together(task *run, const void *model, const void *pass, long threads, int64_t work) {
    struct meeting nobody = {0};
    struct worker me = {&nobody, 0, 1, 0};
    long wanted = threads < MOST_THREADS ? threads : MOST_THREADS;
    int pooled = wanted > 1 && pthread_mutex_trylock(&pool.busy) == 0, is_short = work < SHORT_PASS;
    if (pooled) {
        int64_t now = nanoseconds();
        if (now - pool.ended > OTHER_WORK_NS && is_short) pool.alone_until = now + ALONE_AFTER_OTHER_WORK_NS;
        if (now < pool.alone_until && (is_short || pool.rest)) wanted = 1;
    }
    if (pooled && wanted > 1) {
        if (pool.helpers < wanted - 1) hire(wanted - 1);
        int wait = !is_short || atomic_load(&pool.sleeping) == 0, call = wait || !atomic_load(&pool.called);
        if (wait) {
            me.meeting = &pool.meeting;
            me.of = pool.helpers + 1 < wanted ? pool.helpers + 1 : wanted;
            pool.run = run;
            pool.model = model;
            pool.pass = pass;
        }
        if (call) {
            atomic_store(&pool.called, !wait);
            atomic_store(&pool.resting, 0);
            atomic_store(&pool.job, (atomic_load(&pool.job) / 128 + 1) * 128 + me.of);
            if (atomic_load(&pool.sleeping) > 0) {
                pthread_mutex_lock(&pool.sleep);
                pthread_cond_broadcast(&pool.wake);
                pthread_mutex_unlock(&pool.sleep);
            }
        }
    }
    run(&me, model, pass);
    if (pooled) {
        pool.ended = nanoseconds();
        if (me.waited > TOO_LONG_NS + work / PER_NANOSECOND) {
            pool.rest = pool.rest && pool.ended - pool.late < FORGOTTEN_NS ? 2 * pool.rest : FIRST_REST_NS;
            if (pool.rest > LONGEST_REST_NS) pool.rest = LONGEST_REST_NS;
            pool.alone_until = pool.ended + pool.rest;
            pool.late = pool.ended;
            atomic_store(&pool.resting, 1);
        }
        pthread_mutex_unlock(&pool.busy);
    }
}
