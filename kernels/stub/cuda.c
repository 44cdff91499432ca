// Stands in for libcuda in tests: the driver's functions that Tandem calls, on the CPU.
//
// Device memory is the process's own. What a stream is given is queued and done when something waits or asks again, and then no further
// than that needs, so that a caller that does not wait sees old contents, as it would on a device, and a copy from the host reads what is
// there late. A clock counts what queued work claims to take. Functions that need
// a context fail without one on the calling thread. STUB_* variables and stub_set choose what goes wrong.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
       NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

static long long env(const char *name, long long value) {
    const char *text = getenv(name);
    return text ? atoll(text) : value;
}

// Counters and switches.
static long long allocations, frees, pinned, unpinned, launches, waits, replays, binds, loads, unloads, queued, faults;
static long long refuse_pinned, stuck, peers;
static int sticky;
static float clock_us;

#define COUNTERS(X) X(allocations) X(frees) X(pinned) X(unpinned) X(launches) X(waits) X(replays) X(binds) X(loads) X(unloads) \
    X(queued) X(faults) X(refuse_pinned) X(stuck) X(peers)

long long stub_counter(const char *name) {
#define X(c) if (!strcmp(name, #c)) return c;
    COUNTERS(X)
#undef X
    return -1;
}

void stub_set(const char *name, long long value) {
#define X(c) if (!strcmp(name, #c)) c = value;
    COUNTERS(X)
#undef X
}

// Work.
typedef void (*Work)(void *data);
typedef struct Op { Work work; void *data; size_t bytes; float us; struct Op *next; } Op;
typedef struct { Op *first, **last; } List;

static List queue = {0, &queue.first}, captured = {0, &captured.first};
static int capturing, broken;
static pthread_t capturer;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void append(List *list, Work work, const void *data, size_t bytes, float us) {
    Op *op = malloc(sizeof *op);
    *op = (Op){work, malloc(bytes ? bytes : 1), bytes, us, 0};
    memcpy(op->data, data, bytes);
    *list->last = op;
    list->last = &op->next;
}

// Other stand-ins queue their work here too.
int stub_enqueue(Work work, const void *data, size_t bytes, float us) {
    if (sticky) return sticky;
    queued++;
    append(capturing ? &captured : &queue, work, data, bytes, us);
    return OK;
}

// Does what is queued, until `done` is set if that is given; but now and then the device is quick and does everything.
static int drain_until(const int *done) {
    static unsigned turn;
    if (stuck) return NOT_READY;
    if (turn++ % 3 == 2) done = 0;
    while (queue.first && !(done && *done)) {
        Op *op = queue.first;
        if (!(queue.first = op->next)) queue.last = &queue.first;
        if (!sticky) { op->work(op->data); clock_us += op->us; }
        free(op->data);
        free(op);
    }
    return sticky;
}
static int drain(void) { return drain_until(0); }

static __thread void *current;
#define NEED_CONTEXT do { if (!current) return INVALID_CONTEXT; if (sticky) return sticky; } while (0)
// A call that a capture does not allow breaks it, as in the driver.
#define NOT_IN_CAPTURE do { if (capturing) { broken = 1; return CAPTURE_UNSUPPORTED; } } while (0)

int cuInit(unsigned flags) { return env("STUB_INIT", OK); }
int cuDriverGetVersion(int *version) { *version = env("STUB_DRIVER_VERSION", 13000); return OK; }

int cuGetErrorName(int code, const char **name) {
    switch (code) {
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    case 803: *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; break;
    default: *name = "CUDA_ERROR_OF_THE_STUB";
    }
    return OK;
}
int cuGetErrorString(int code, const char **text) { *text = "words of the driver"; return OK; }

int cuDeviceGetCount(int *count) { *count = env("STUB_DEVICES", 1); return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int len, int device) { snprintf(name, len, "Stub %d", device); return OK; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, device + 1, 16); return OK; }
int cuDeviceGetPCIBusId(char *id, int len, int device) { snprintf(id, len, "0000:0%d:00.0", device); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = env("STUB_MEMORY", 1 << 30); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    // STUB_CAPABILITY is a list of two digits for each device.
    const char *list = getenv("STUB_CAPABILITY");
    int capability = 90;
    for (int i = 0; list && *list && i <= device; i++) {
        capability = atoi(list);
        list = strchr(list, ',') ? strchr(list, ',') + 1 : "";
    }
    switch (attribute) {
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 16: *value = 7; break;           // multiprocessors
    case 38: *value = 64 << 10; break;    // L2
    case 97: *value = 100 << 10; break;   // shared memory of a block, opted in
    case 115: *value = 1; break;          // memory pools
    default: *value = 0;
    }
    return OK;
}

static char context;
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = &context; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxSetCurrent(void *ctx) { current = ctx; binds++; return OK; }
int cuCtxGetCurrent(void **out) { *out = current; return OK; }

static char stream;
int cuStreamCreate(void **out, unsigned flags) { NEED_CONTEXT; *out = &stream; return OK; }
int cuStreamDestroy_v2(void *s) { return OK; }
int cuStreamSynchronize(void *s) { NEED_CONTEXT; NOT_IN_CAPTURE; waits++; return drain(); }
int cuStreamQuery(void *s) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    if (!queue.first) return OK;
    int status = drain();   // done by the time of the next question
    return status ? status : NOT_READY;
}

// Memory.
static size_t used;
// STUB_SHARED=1: other processes can open memory of two megabytes, by a file without a name that this one has open.
typedef struct { size_t bytes; int file; char pad[244]; } Head;
static Head *take(size_t bytes) {
    if (!env("STUB_SHARED", 0) || bytes != 2 << 20) {
        Head *head = aligned_alloc(256, (sizeof *head + bytes + 255) / 256 * 256);
        head->file = -1;
        return head;
    }
    int file = memfd_create("tandem-stub", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, sizeof(Head) + bytes)) return 0;
    Head *head = mmap(0, sizeof *head + bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (head == MAP_FAILED) return 0;
    head->file = file;
    return head;
}
int cuMemAlloc_v2(uint64_t *ptr, size_t bytes) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    if (!bytes) return INVALID_VALUE;
    if (used + bytes > (size_t)env("STUB_MEMORY", 1 << 30)) return OUT_OF_MEMORY;
    Head *head = take(bytes);
    if (!head) return OUT_OF_MEMORY;
    head->bytes = bytes;
    memset(head + 1, 0xff, bytes);        // NaN: nothing may count on zeros
    used += bytes;
    allocations++;
    *ptr = (uint64_t)(head + 1);
    return OK;
}
int cuMemFree_v2(uint64_t ptr) {
    NEED_CONTEXT;
    if (capturing) return CAPTURE_UNSUPPORTED;
    drain();
    Head *head = (Head *)ptr - 1;
    used -= head->bytes;
    frees++;
    if (head->file < 0) { free(head); return OK; }
    close(head->file);
    munmap(head, sizeof *head + head->bytes);
    return OK;
}
int cuMemGetInfo_v2(size_t *left, size_t *total) {
    NEED_CONTEXT;
    *total = env("STUB_MEMORY", 1 << 30);
    *left = *total - used;
    return OK;
}
int cuMemHostAlloc(void **ptr, size_t bytes, unsigned flags) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    if (refuse_pinned) return OUT_OF_MEMORY;
    *ptr = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(*ptr, 0xff, bytes);
    pinned++;
    return OK;
}
int cuMemFreeHost(void *ptr) { NEED_CONTEXT; unpinned++; free(ptr); return OK; }

// Memory shared between processes: a handle has the address in it, where the owner has the file, and a mark.
typedef struct { uint64_t mark, ptr, bytes; int owner, file; char pad[32]; } Shared;
static struct { Head *head; size_t bytes; } opened[64];
int cuIpcGetMemHandle(Shared *out, uint64_t ptr) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    Head *head = (Head *)ptr - 1;
    *out = (Shared){0x5a5a, ptr, sizeof *head + head->bytes, getpid(), head->file};
    memset(out->pad, 0xa5, sizeof out->pad);
    return OK;
}
int cuIpcOpenMemHandle_v2(uint64_t *ptr, Shared handle, unsigned flags) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    if (handle.mark != 0x5a5a || (unsigned char)handle.pad[31] != 0xa5 || flags != 1) return INVALID_VALUE;
    if (handle.owner == getpid()) {        // which the driver refuses
        peers++;
        *ptr = handle.ptr;
        return OK;
    }
    if (handle.file < 0 || env("STUB_NO_PEERS", 0)) return INVALID_VALUE;
    int slot = 0;
    while (slot < 64 && opened[slot].head) slot++;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.owner, handle.file);
    int file = open(path, O_RDWR);
    if (slot == 64 || file < 0) return INVALID_VALUE;
    Head *head = mmap(0, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (head == MAP_FAILED) return INVALID_VALUE;
    opened[slot].head = head;
    opened[slot].bytes = handle.bytes;
    peers++;
    *ptr = (uint64_t)(head + 1);
    return OK;
}
int cuIpcCloseMemHandle(uint64_t ptr) {
    NEED_CONTEXT;
    peers--;
    for (int slot = 0; slot < 64; slot++)
        if (opened[slot].head && (uint64_t)(opened[slot].head + 1) == ptr) {
            munmap(opened[slot].head, opened[slot].bytes);
            opened[slot].head = 0;
        }
    return OK;
}

typedef struct { void *to; const void *from; size_t bytes; int value; } Copy;
static void do_copy(void *data) { Copy *c = data; memcpy(c->to, c->from, c->bytes); }
static void do_fill(void *data) { Copy *c = data; memset(c->to, c->value, c->bytes); }
static int copy(uint64_t to, uint64_t from, size_t bytes) {
    NEED_CONTEXT;
    Copy c = {(void *)to, (void *)from, bytes, 0};
    return stub_enqueue(do_copy, &c, sizeof c, 1);
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *s) { return copy(to, (uint64_t)from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *s) { return copy((uint64_t)to, from, bytes); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *s) { return copy(to, from, bytes); }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *s) {
    NEED_CONTEXT;
    if (!bytes) return INVALID_VALUE;
    Copy c = {(void *)to, 0, bytes, value};
    return stub_enqueue(do_fill, &c, sizeof c, 1);
}

// Events.
// Recorded anew, an event is that of the last time.
typedef struct { int recorded, times, asked, done; float us; } Event;
static void do_event(void *data) { Event *e = *(Event **)data; e->done = !--e->times; e->us = clock_us; }
int cuEventCreate(void **out, unsigned flags) { NEED_CONTEXT; *out = calloc(1, sizeof(Event)); return OK; }
int cuEventDestroy_v2(void *event) { NEED_CONTEXT; drain(); free(event); return OK; }
int cuEventRecord(void *event, void *s) {
    NEED_CONTEXT;
    Event *e = event;
    e->recorded = 1;
    e->times++;
    e->asked = e->done = 0;
    return stub_enqueue(do_event, &event, sizeof event, 0);
}
int cuEventQuery(void *event) {
    NEED_CONTEXT;
    Event *e = event;
    if (!e->recorded || e->done) return sticky;
    // Not even begun at the first question: more may be queued behind it meanwhile.
    if (!e->asked++) return NOT_READY;
    int status = drain_until(&e->done);
    return status ? status : NOT_READY;
}
int cuEventSynchronize(void *event) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    waits++;
    Event *e = event;
    return e->recorded ? drain_until(&e->done) : OK;
}
int cuEventElapsedTime(float *ms, void *start, void *end) {
    NEED_CONTEXT;
    if (!((Event *)start)->done || !((Event *)end)->done) return NOT_READY;
    *ms = (((Event *)end)->us - ((Event *)start)->us) / 1000;
    return OK;
}

// Modules: an image is "STUBCUBIN" and a source that names some of these kernels, or a shared library of the stand-in for NVRTC with
// kernels that run on a CPU.
typedef struct { const char *kernel; unsigned grid[3], threads, shared_bytes; const uint64_t *arguments; unsigned num_arguments; } Emulated;
typedef const char *(*Emulate)(const Emulated *launches, unsigned num_launches, uint64_t seed);
typedef struct { char *source; void *library; Emulate emulate; } Module;

static void k_add(void **a, const unsigned *g) {   // (int *out, const int *in, int add, int n): one thread a value
    int *out = *(int **)a[0], *in = *(int **)a[1], add = *(int *)a[2], n = *(int *)a[3];
    for (int i = 0; i < (int)(g[0] * g[3]) && i < n; i++) out[i] = in[i] + add;
}
static void k_types(void **a, const unsigned *g) { // (u64 *out, i32, u32, f32, i64, u64): the bytes of each
    uint64_t *out = *(uint64_t **)a[0];
    out[0] = *(uint32_t *)a[1];
    out[1] = *(uint32_t *)a[2];
    out[2] = *(uint32_t *)a[3];
    out[3] = *(uint64_t *)a[4];
    out[4] = *(uint64_t *)a[5];
}
static void k_shape(void **a, const unsigned *g) { // (u32 *out): grid, block, shared memory
    memcpy(*(void **)a[0], g, 7 * sizeof *g);
}
static void k_fault(void **a, const unsigned *g) { sticky = ILLEGAL_ADDRESS; faults++; }

enum { MAX_ARGS = 32 };
typedef struct { const char *name; void (*run)(void **, const unsigned *); int nargs; int sizes[6]; int dynamic; Emulate emulate; } Function;
static Function functions[] = {
    {"add", k_add, 4, {8, 8, 4, 4}},
    {"types", k_types, 6, {8, 4, 4, 4, 8, 8}},
    {"shape", k_shape, 1, {8}},
    {"fault", k_fault, 0, {0}},
};
static int load_library(Module *m, const void *image) {
    const Elf64_Ehdr *header = image;
    size_t bytes = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    char path[] = "/tmp/tandem-emulated-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return INVALID_IMAGE;
    int written = write(file, image, bytes) == (ssize_t)bytes;
    close(file);
    m->library = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : 0;
    unlink(path);
    if (m->library) m->emulate = (Emulate)dlsym(m->library, "tandem_emulate");
    return m->emulate ? OK : INVALID_IMAGE;
}
int cuModuleLoadData(void **out, const void *image) {
    NEED_CONTEXT;
    NOT_IN_CAPTURE;
    int is_library = !memcmp(image, ELFMAG, SELFMAG);
    if (!is_library && memcmp(image, "STUBCUBIN", 9)) return INVALID_IMAGE;
    Module *m = calloc(1, sizeof *m);
    if (is_library && load_library(m, image)) return INVALID_IMAGE;
    if (!is_library) m->source = strdup(image);
    *out = m;
    loads++;
    return OK;
}
// A library stays open: what it made is freed with the process.
int cuModuleUnload(void *module) { NEED_CONTEXT; unloads++; free(((Module *)module)->source); free(module); return OK; }
int cuModuleGetFunction(void **out, void *module, const char *name) {
    NEED_CONTEXT;
    Module *m = module;
    if (m->emulate) {
        Function *f = calloc(1, sizeof *f);
        *f = (Function){strdup(name), 0, 0, {0}, 0, m->emulate};
        *out = f;
        return OK;
    }
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!strcmp(functions[i].name, name) && strstr(m->source, name)) { *out = &functions[i]; return OK; }
    return NOT_FOUND;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    // most threads, static shared memory, constant and local memory, registers
    static const int values[] = {1024, 1024, 0, 16, 40};
    *value = attribute < 5 ? values[attribute] : 0;
    return OK;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    NEED_CONTEXT;
    if (attribute != 8) return INVALID_VALUE;
    ((Function *)function)->dynamic = value;
    return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    *blocks = 2048 / threads;
    return OK;
}

typedef struct { Function *function; unsigned g[7]; unsigned nargs; uint64_t args[MAX_ARGS]; } Launch;
static void do_launch(void *data) {
    Launch *l = data;
    launches++;
    if (l->function->emulate) {
        Emulated e = {l->function->name, {l->g[0], l->g[1], l->g[2]}, l->g[3], l->g[6], l->args, l->nargs};
        const char *error = l->function->emulate(&e, 1, launches);
        if (error) {
            fprintf(stderr, "stand-in GPU: %s\n", error);
            sticky = ILLEGAL_ADDRESS;
        }
        return;
    }
    void *args[MAX_ARGS];
    for (int i = 0; i < MAX_ARGS; i++) args[i] = &l->args[i];
    l->function->run(args, l->g);
}
typedef struct {
    unsigned gx, gy, gz, bx, by, bz, shared;
    void *stream;
    struct { int id, pad; char value[64]; } *attributes;
    unsigned nattributes;
} LaunchConfig;
int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **args, void **extra) {
    NEED_CONTEXT;
    unsigned gx = config->gx, gy = config->gy, gz = config->gz, bx = config->bx, by = config->by, bz = config->bz;
    unsigned shared = config->shared;
    // The only attribute lets a launch begin early, which one that does not is a special case of.
    int major;
    cuDeviceGetAttribute(&major, 75, 0);
    for (unsigned i = 0; i < config->nattributes; i++)
        if (config->attributes[i].id != 6 || major < 9) return INVALID_VALUE;
    Launch l = {function, {gx, gy, gz, bx, by, bz, shared}, 0, {0}};
    int allowed = l.function->dynamic ? l.function->dynamic : (48 << 10) - 1024;
    if (!gx || !gy || !gz || !bx || bx * by * bz > 1024 || (int)shared > allowed) return INVALID_VALUE;
    // Of a kernel on a CPU the library knows the parameters; Tandem gives every argument eight bytes and ends their list with nothing.
    if (l.function->emulate) {
        while (l.nargs < MAX_ARGS && args[l.nargs]) memcpy(&l.args[l.nargs], args[l.nargs], 8), l.nargs++;
    } else {
        for (int i = 0; i < l.function->nargs; i++) memcpy(&l.args[i], args[i], l.function->sizes[i]);
    }
    return stub_enqueue(do_launch, &l, sizeof l, 3);
}

// Graphs: a list of captured work.
int cuStreamBeginCapture_v2(void *s, int mode) {
    NEED_CONTEXT;
    if (capturing) return INVALID_VALUE;
    capturing = 1;
    broken = 0;
    capturer = pthread_self();
    captured = (List){0, &captured.first};
    return OK;
}
int cuStreamEndCapture(void *s, void **graph) {
    *graph = 0;
    if (!capturing) return INVALID_VALUE;
    capturing = 0;
    if (broken) return CAPTURE_INVALIDATED;
    // A graph of nothing is one too.
    *(Op **)(*graph = malloc(sizeof(Op *))) = captured.first;
    return OK;
}
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { NEED_CONTEXT; *exec = graph; return OK; }
int cuGraphDestroy(void *graph) { return OK; }  // the executable one is the same
int cuGraphExecDestroy(void *exec) { free(exec); return OK; }
int cuGraphUpload(void *exec, void *s) { NEED_CONTEXT; return OK; }
int cuGraphLaunch(void *exec, void *s) {
    NEED_CONTEXT;
    if (capturing) return INVALID_VALUE;
    replays++;
    for (Op *op = *(Op **)exec; op; op = op->next) stub_enqueue(op->work, op->data, op->bytes, op->us);
    return OK;
}
