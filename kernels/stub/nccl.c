// Stands in for NCCL in tests: ranks are threads of one process, and sums are real.
//
// A collective is queued at once and done when the last rank has queued it; `pending` counts those that are not. STUB_* variables
// and stub_set choose what goes wrong. `violations` counts what a caller must not do: use a communicator after its end, or enter
// one from two threads.
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, IN_PROGRESS = 7 };

static long long env(const char *name, long long value) {
    const char *text = getenv(name);
    return text ? atoll(text) : value;
}

// init_code: of the call. init_async: of the state while joining. async_error: of the state later. call_code: of collectives.
// polls: how often the state is "in progress" after a call. stuck: collectives never end. call_ms: how long queueing takes.
// graphs: those that hold collectives.
static long long init_code, init_async, async_error, call_code, polls, stuck, call_ms, graphs;
static long long pending, aborts, destroys, finalizes, violations, collectives, ids, inits, in_call;
#define COUNTERS(X) X(init_code) X(init_async) X(async_error) X(call_code) X(polls) X(stuck) X(call_ms) X(graphs) X(pending) \
    X(aborts) X(destroys) X(finalizes) X(violations) X(collectives) X(ids) X(inits) X(in_call)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

long long stub_counter(const char *name) {
    pthread_mutex_lock(&lock);
    long long value = -1;
#define X(c) if (!strcmp(name, #c)) value = c;
    COUNTERS(X)
#undef X
    pthread_mutex_unlock(&lock);
    return value;
}

void stub_set(const char *name, long long value) {
    pthread_mutex_lock(&lock);
#define X(c) if (!strcmp(name, #c)) c = value;
    COUNTERS(X)
#undef X
    pthread_mutex_unlock(&lock);
}

typedef struct { char bytes[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, min, max; const char *net; int share; } Config;

enum { REDUCE = 1, GATHER, BROADCAST };
typedef struct { int kind, type, root; size_t count; const void *send; void *receive; } Op;

#define RANKS 8
#define OPS 64
typedef struct Group {
    Id id;
    int size, joined;
    Op ops[RANKS][OPS];
    int queued[RANKS], done;
    struct Group *next;
} Group;
typedef struct { Group *group; int rank, dead, busy, polls; } Comm;
static Group *groups;

static size_t size_of(int type) { return type <= 1 ? 1 : type == 9 || type == 6 ? 2 : type == 4 || type == 5 || type == 8 ? 8 : 4; }
static float load(const void *at, int type, size_t i) {
    if (type == 7) return ((const float *)at)[i];
    if (type == 2) return ((const int *)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    float f;
    return memcpy(&f, &bits, 4), f;
}
static void store(void *at, int type, size_t i, float f) {
    if (type == 7) { ((float *)at)[i] = f; return; }
    if (type == 2) { ((int *)at)[i] = f; return; }
    uint32_t bits;
    memcpy(&bits, &f, 4);
    ((uint16_t *)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// All ranks have queued operation `n`.
static void run(Group *g, int n) {
    Op *first = &g->ops[0][n];
    for (int r = 1; r < g->size; r++) {
        Op *o = &g->ops[r][n];
        if (o->kind != first->kind || o->type != first->type || o->count != first->count || o->root != first->root) violations++;
    }
    size_t bytes = first->count * size_of(first->type);
    if (first->kind == REDUCE) {
        float *sums = calloc(first->count + 1, sizeof *sums);
        for (int r = 0; r < g->size; r++)
            for (size_t i = 0; i < first->count; i++) sums[i] += load(g->ops[r][n].send, first->type, i);
        for (int r = 0; r < g->size; r++)
            for (size_t i = 0; i < first->count; i++) store(g->ops[r][n].receive, first->type, i, sums[i]);
        free(sums);
    } else if (first->kind == GATHER) {
        for (int r = 0; r < g->size; r++)
            for (int s = 0; s < g->size; s++) memmove((char *)g->ops[r][n].receive + s * bytes, g->ops[s][n].send, bytes);
    } else {
        for (int r = 0; r < g->size; r++) memmove(g->ops[r][n].receive, g->ops[first->root][n].send, bytes);
    }
    pending -= g->size;
}

int ncclGetVersion(int *version) { *version = env("STUB_NCCL_VERSION", 22703); return SUCCESS; }
const char *ncclGetLastError(void *comm) { return "words of the stub\n"; }
int ncclGetUniqueId(Id *id) {
    if (env("STUB_NCCL_ID", SUCCESS)) return env("STUB_NCCL_ID", SUCCESS);
    pthread_mutex_lock(&lock);
    memset(id, 0xa5, sizeof *id);
    id->bytes[5] = 0;             // ids may have zeros in them
    id->bytes[0] = ++ids;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommInitRankConfig(Comm **out, int size, Id id, int rank, Config *config) {
    *out = 0;
    if (config->size != sizeof *config || config->magic != 0xcafebeef || config->version < 21800 || config->blocking != 0 ||
        config->cga != INT_MIN || config->min != INT_MIN || config->max != INT_MIN || config->net || config->share != INT_MIN)
        return INVALID_ARGUMENT;
    pthread_mutex_lock(&lock);
    inits++;
    int code = init_code;
    if (!code) {
        Group *g = groups;
        while (g && memcmp(&g->id, &id, sizeof id)) g = g->next;
        if (!g) {
            g = calloc(1, sizeof *g);
            g->id = id;
            g->size = size;
            g->next = groups;
            groups = g;
        }
        if (g->size != size || rank >= size || g->joined >= size) code = INVALID_ARGUMENT;
        else {
            g->joined++;
            Comm *c = calloc(1, sizeof *c);
            *c = (Comm){g, rank, 0, 0, polls};
            *out = c;
            code = IN_PROGRESS;
        }
    }
    pthread_mutex_unlock(&lock);
    return code;
}

// Enters a communicator; the lock is held after.
static int enter(Comm *c) {
    pthread_mutex_lock(&lock);
    in_call++;
    if (c->dead || c->busy) { violations++; return 0; }
    c->busy = 1;
    return 1;
}
static void leave(Comm *c) {
    c->busy = 0;
    in_call--;
    pthread_mutex_unlock(&lock);
}

int ncclCommGetAsyncError(Comm *c, int *state) {
    enter(c);
    int joining = c->group->joined < c->group->size;
    *state = SUCCESS;
    if (joining) *state = init_async ? init_async : IN_PROGRESS;
    else if (async_error) *state = async_error;
    else if (c->polls > 0) { c->polls--; *state = IN_PROGRESS; }
    leave(c);
    return SUCCESS;
}

static int queue(Comm *c, Op op) {
    enter(c);
    int code = call_code;
    if (call_ms) {
        // Busy without the stub's own lock, as when the device's queue is full.
        pthread_mutex_unlock(&lock);
        usleep(call_ms * 1000);
        pthread_mutex_lock(&lock);
    }
    if (!code) {
        Group *g = c->group;
        int n = g->queued[c->rank]++;
        g->ops[c->rank][n % OPS] = op;
        pending++;
        collectives++;
        int all = 1;
        for (int r = 0; r < g->size; r++) all &= g->queued[r] > g->done;
        if (all && !stuck) run(g, g->done++ % OPS);
        if (polls) { c->polls = polls; code = IN_PROGRESS; }
    }
    leave(c);
    return code;
}
int ncclAllReduce(const void *send, void *receive, size_t count, int type, int op, Comm *c, void *stream) {
    if (op != 0 || (type != 7 && type != 9 && type != 2)) return INVALID_ARGUMENT;
    return queue(c, (Op){REDUCE, type, 0, count, send, receive});
}
int ncclAllGather(const void *send, void *receive, size_t count, int type, Comm *c, void *stream) {
    return queue(c, (Op){GATHER, type, 0, count, send, receive});
}
int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root, Comm *c, void *stream) {
    return queue(c, (Op){BROADCAST, type, root, count, send, receive});
}

int ncclCommFinalize(Comm *c) {
    enter(c);
    finalizes++;
    c->polls = polls;
    leave(c);
    return IN_PROGRESS;
}
int ncclCommDestroy(Comm *c) { enter(c); destroys++; c->dead = 1; leave(c); return SUCCESS; }
int ncclCommAbort(Comm *c) {
    enter(c);
    aborts++;
    c->dead = 1;
    leave(c);
    // As the library does for graphs that hold collectives.
    while (stub_counter("graphs") > 0) usleep(1000);
    return SUCCESS;
}
