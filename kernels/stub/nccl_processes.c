// Stands in for NCCL between processes, for tests of a whole group: rank 0 of a communicator sums, over Unix sockets, and collectives
// wait in the stand-in driver's queue like all other work, also in graphs.
//
// An id names a socket. A rank that is gone, or a communicator that is given up, ends whatever waits, and the state says so.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { REDUCE = 1, GATHER, BROADCAST };

typedef struct { char bytes[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, min, max; const char *net; int share; } Config;
enum { RANKS = 64 };
typedef struct {
    Id id;
    int rank, size;
    int peers[RANKS];         // of rank 0: all others; of the others: rank 0, in the first place
    int listener;
    _Atomic int state, over;
} Comm;
typedef struct { Comm *comm; int kind, type, root; size_t count; const void *send; void *receive; } Op;

long long stub_counter(const char *name) { return -1; }
void stub_set(const char *name, long long value) {}

int ncclGetVersion(int *version) { *version = 22703; return SUCCESS; }
const char *ncclGetLastError(void *comm) { return "a rank is gone"; }
int ncclGetUniqueId(Id *id) {
    static _Atomic int count;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "tandem-stand-in-nccl-%d-%d-%lld", (int)getpid(), count++, (long long)now.tv_nsec);
    return SUCCESS;
}

// A name that is no file, so that nothing is left behind.
static struct sockaddr_un address(const Id *id, socklen_t *length) {
    struct sockaddr_un name = {AF_UNIX};
    snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "%s", id->bytes);
    *length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name.sun_path + 1);
    return name;
}
static int move_all(int socket, void *data, size_t bytes, int out) {
    for (char *at = data; bytes > 0;) {
        ssize_t moved = out ? send(socket, at, bytes, MSG_NOSIGNAL) : recv(socket, at, bytes, 0);
        if (moved <= 0) return 0;
        at += moved;
        bytes -= moved;
    }
    return 1;
}

static void *join(void *data) {
    Comm *c = data;
    socklen_t length;
    struct sockaddr_un name = address(&c->id, &length);
    int ok = 1;
    if (c->rank == 0) {
        for (int i = 1; ok && i < c->size; i++) {
            int rank, peer = accept(c->listener, 0, 0);
            ok = peer >= 0 && move_all(peer, &rank, sizeof rank, 0) && rank > 0 && rank < c->size && c->peers[rank] < 0;
            if (ok) c->peers[rank] = peer;
        }
    } else {
        int tries = 0;
        while (connect(c->peers[0], (struct sockaddr *)&name, length) && (ok = !c->over && tries++ < 3000)) usleep(10000);
        ok = ok && move_all(c->peers[0], &c->rank, sizeof c->rank, 1);
    }
    c->state = ok ? SUCCESS : REMOTE_ERROR;
    return 0;
}

int ncclCommInitRankConfig(Comm **out, int size, Id id, int rank, Config *config) {
    *out = 0;
    if (config->blocking != 0 || size > RANKS || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    Comm *c = calloc(1, sizeof *c);
    *c = (Comm){id, rank, size};
    c->state = IN_PROGRESS;
    for (int i = 0; i < RANKS; i++) c->peers[i] = -1;
    int own = socket(AF_UNIX, SOCK_STREAM, 0);
    if (rank == 0) {
        socklen_t length;
        struct sockaddr_un name = address(&id, &length);
        c->listener = own;
        if (bind(own, (struct sockaddr *)&name, length) || listen(own, RANKS)) return INVALID_ARGUMENT;
    } else {
        c->listener = -1;
        c->peers[0] = own;
    }
    pthread_t thread;
    pthread_create(&thread, 0, join, c);
    pthread_detach(thread);
    *out = c;
    return IN_PROGRESS;
}
int ncclCommGetAsyncError(Comm *c, int *state) { *state = c->state; return SUCCESS; }

static size_t size_of(int type) { return type == 9 ? 2 : 4; }
static float load(const void *at, int type, size_t i) {
    if (type == 7) return ((const float *)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    float f;
    return memcpy(&f, &bits, 4), f;
}
static void store(void *at, int type, size_t i, float f) {
    if (type == 7) { ((float *)at)[i] = f; return; }
    uint32_t bits;
    memcpy(&bits, &f, 4);
    ((uint16_t *)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Every rank's values come to rank 0, which hands all of them out.
static void collect(void *data) {
    Op *o = data;
    Comm *c = o->comm;
    size_t bytes = o->count * size_of(o->type);
    char *all = malloc(c->size * bytes + 1);
    int ok = c->state == SUCCESS && !c->over;
    if (c->rank == 0) {
        memcpy(all, o->send, bytes);
        for (int r = 1; ok && r < c->size; r++) ok = move_all(c->peers[r], all + r * bytes, bytes, 0);
        for (int r = 1; ok && r < c->size; r++) ok = move_all(c->peers[r], all, c->size * bytes, 1);
    } else {
        ok = ok && move_all(c->peers[0], (void *)o->send, bytes, 1) && move_all(c->peers[0], all, c->size * bytes, 0);
    }
    if (!ok) {
        c->state = REMOTE_ERROR;
    } else if (o->kind == GATHER) {
        memcpy(o->receive, all, c->size * bytes);
    } else if (o->kind == BROADCAST) {
        memcpy(o->receive, all + o->root * bytes, bytes);
    } else {
        for (size_t i = 0; i < o->count; i++) {
            float sum = 0;
            for (int r = 0; r < c->size; r++) sum += load(all + r * bytes, o->type, i);
            store(o->receive, o->type, i, sum);
        }
    }
    free(all);
}
static int queue(Op op) {
    static int (*enqueue)(void (*)(void *), const void *, size_t, float);
    if (!enqueue) enqueue = dlsym(dlopen("libcuda.so", RTLD_NOW), "stub_enqueue");
    if (op.type != 7 && op.type != 9) return INVALID_ARGUMENT;
    // STUB_NCCL_US: what a collective claims to take.
    const char *us = getenv("STUB_NCCL_US");
    return enqueue(collect, &op, sizeof op, us ? atof(us) : 10) ? REMOTE_ERROR : SUCCESS;
}
int ncclAllReduce(const void *send, void *receive, size_t count, int type, int op, Comm *c, void *stream) {
    return op ? INVALID_ARGUMENT : queue((Op){c, REDUCE, type, 0, count, send, receive});
}
int ncclAllGather(const void *send, void *receive, size_t count, int type, Comm *c, void *stream) {
    return queue((Op){c, GATHER, type, 0, count, send, receive});
}
int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root, Comm *c, void *stream) {
    return queue((Op){c, BROADCAST, type, root, count, send, receive});
}

static void end(Comm *c) {
    c->over = 1;
    if (c->listener >= 0) shutdown(c->listener, SHUT_RDWR);
    for (int i = 0; i < RANKS; i++) if (c->peers[i] >= 0) shutdown(c->peers[i], SHUT_RDWR);
}
int ncclCommFinalize(Comm *c) { return SUCCESS; }
int ncclCommDestroy(Comm *c) { end(c); return SUCCESS; }
// What is queued still names the communicator: its memory stays.
int ncclCommAbort(Comm *c) { end(c); return SUCCESS; }
