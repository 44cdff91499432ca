// Stands in for a GPU, for tests: a block's threads run as fibers on one CPU thread, each until its next barrier or warp
// operation. Included before `common.cuh`, whose section "machine" it replaces.
//
// It is stricter than a GPU where that finds mistakes:
// * blocks, warps and lanes run in an order drawn from the launch's seed, so that a missing barrier shows;
// * shared memory is filled with NaN before each block, and a background copy happens as late as it may, over NaN;
// * all threads of a block or warp must reach each barrier or warp operation, the same one, and none may have left;
// * every thread must have waited for the launch before;
// * accesses of 4 to 16 bytes must be aligned, and rows of ldmatrix must be free of bank conflicts.
//
// Blocks of one launch run one after the other. Launches that are made together run side by side, as all-reduces of several
// ranks need, but for those of one stream, which follow each other; they may not use shared memory.
#pragma once
#define TANDEM_EMULATE 1
#define PLAIN_FP8

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#include <csignal>
#include <ctime>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulate {

struct Dim { unsigned x, y, z; };

// One argument is eight bytes, its value in the first of them.
struct Launch {
    const char* kernel;
    Dim grid;
    unsigned threads, shared_bytes;
    const uint64_t* arguments;
    unsigned num_arguments;
    unsigned stream;
};

using Call = void (*)(const uint64_t* arguments);
struct Entry { const char* name; unsigned max_threads, num_arguments; Call call; Entry* next; };
inline Entry* entries = nullptr;

enum State { NOT_STARTED, READY, AT_WARP, AT_BLOCK, DONE };
constexpr size_t STACK_BYTES = 128 << 10;
constexpr unsigned LANES = 32;

struct Copy { void* to; const void* from; bool valid; int group; };
struct Warp;
struct Block;

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    State state;
    unsigned lane;
    Dim thread;
    Warp* warp;
    Block* block;
    std::vector<Copy> copies;
    int groups;
    bool has_waited;
};

struct Warp {
    Fiber* fibers[LANES];
    unsigned arrived;
    const char* operation;
    alignas(16) unsigned char in[LANES][64], out[LANES][32];
};

struct Block {
    Dim index, size, grid;
    const Entry* entry;
    const Launch* launch;
    unsigned arrived, done;
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
};

inline Fiber* current = nullptr;
inline Fiber scheduler;
inline std::string error;
inline uint64_t random_state = 1;
inline unsigned char* dynamic_shared = nullptr;
inline long spins = 0;
// Who is waited for may be another process, which gets a core now and then.
inline time_t began = 0;
constexpr time_t MOST_SECONDS = 120;

inline unsigned random_below(unsigned n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>((random_state >> 33) % n);
}
template <class T>
void shuffle(std::vector<T>& items) {
    for (unsigned i = static_cast<unsigned>(items.size()); i > 1; i--) std::swap(items[i - 1], items[random_below(i)]);
}

#if defined(__x86_64__)
extern "C" void tandem_switch_fiber(void** save, void* load);
asm(R"(
.text
.hidden tandem_switch_fiber
.globl tandem_switch_fiber
tandem_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void switch_fiber(Fiber* from, Fiber* to) { tandem_switch_fiber(&from->stack_pointer, to->stack_pointer); }
#else
inline void switch_fiber(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
#endif

inline void yield() { switch_fiber(current, &scheduler); }

// Ends the launch: the fibers are never resumed.
[[noreturn]] inline void fail(const std::string& message) {
    if (error.empty()) {
        const Block& b = *current->block;
        error = message + " (block " + std::to_string(b.index.x) + "," + std::to_string(b.index.y) + "," +
                std::to_string(b.index.z) + ", thread " + std::to_string(current->thread.x) + ")";
    }
    for (;;) yield();
}

inline void fiber_main() {
    Block* block = current->block;
    block->entry->call(block->launch->arguments);
    if (!current->has_waited) fail("does not wait for the launch before");
    current->state = DONE;
    block->done++;
    for (;;) yield();
}

inline void start(Fiber* fiber, unsigned char* stack) {
    fiber->state = NOT_STARTED;
    fiber->copies.clear();
    fiber->groups = 0;
    fiber->has_waited = false;
#if defined(__x86_64__)
    auto top = reinterpret_cast<void**>(stack + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->stack_pointer = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = STACK_BYTES};
    makecontext(&fiber->context, fiber_main, 0);
#endif
}

inline void barrier() {
    Block& block = *current->block;
    if (block.done > 0) fail("barrier after a thread has left");
    if (++block.arrived == block.fibers.size()) {
        block.arrived = 0;
        for (Fiber* fiber : block.fibers) {
            if (fiber != current && fiber->state != AT_BLOCK) fail("threads wait at different barriers");
            fiber->state = READY;
        }
        return;
    }
    current->state = AT_BLOCK;
    yield();
}

// Gives what all lanes put in to `compute(warp)`, which fills what all take out.
template <class In, class Out, class F>
Out together(const char* operation, const In& in, F compute) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 32);
    Warp& warp = *current->warp;
    if (warp.arrived == 0) warp.operation = operation;
    if (strcmp(warp.operation, operation) != 0)
        fail(std::string("lanes are at ") + warp.operation + " and at " + operation);
    memcpy(warp.in[current->lane], &in, sizeof(In));
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        compute(warp);
        for (Fiber* fiber : warp.fibers) fiber->state = READY;
    } else {
        current->state = AT_WARP;
        yield();
    }
    Out out;
    memcpy(&out, warp.out[current->lane], sizeof(Out));
    return out;
}
template <class T>
T get(const Warp& warp, unsigned lane) {
    T value;
    memcpy(&value, warp.in[lane], sizeof(T));
    return value;
}
template <class T>
void put(Warp& warp, unsigned lane, const T& value) { memcpy(warp.out[lane], &value, sizeof(T)); }

inline void need_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("access of " + std::to_string(bytes) + " bytes is not aligned");
}
template <class T>
T load(const void* p) {
    need_aligned(p, sizeof(T));
    T value;
    memcpy(&value, p, sizeof(T));
    return value;
}
template <class T>
void store(void* p, T value) {
    need_aligned(p, sizeof(T));
    memcpy(p, &value, sizeof(T));
}

// Lets the first launch of each stream begin that still has blocks to run.
inline void begin_launches(const std::vector<Block*>& blocks) {
    for (Block* block : blocks) {
        if (block->fibers[0]->state != NOT_STARTED) continue;
        bool first = true;
        for (Block* other : blocks)
            first &= other->launch->stream != block->launch->stream || other->launch >= block->launch ||
                     other->done == other->fibers.size();
        if (first) for (Fiber* fiber : block->fibers) fiber->state = READY;
    }
}

// Runs the fibers of these blocks to their end.
inline void run(std::vector<Block*>& blocks) {
    std::vector<Warp*> warps;
    for (Block* block : blocks) for (Warp& warp : block->warps) warps.push_back(&warp);
    std::vector<unsigned> lanes(LANES);
    for (unsigned i = 0; i < LANES; i++) lanes[i] = i;
    for (;;) {
        bool ran = false, left = false;
        begin_launches(blocks);
        shuffle(warps);
        for (Warp* warp : warps) {
            shuffle(lanes);
            for (bool again = true; again;) {
                again = false;
                for (unsigned lane : lanes) {
                    Fiber* fiber = warp->fibers[lane];
                    if (fiber->state != READY) continue;
                    const long before = spins;
                    current = fiber;
                    switch_fiber(&scheduler, fiber);
                    if (!error.empty()) return;
                    // A lane that spins lets the other warps run first.
                    again |= spins == before;
                    ran = true;
                }
            }
            for (Fiber* fiber : warp->fibers) left |= fiber->state != DONE;
        }
        if (!left) return;
        if (!ran) { error = "some threads never reach a barrier that others wait at"; return; }
        if (spins > 10'000'000 && time(nullptr) - began > MOST_SECONDS) { error = "spins without end"; return; }
    }
}

extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_emulated_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_emulated_shared[];

struct Pool {
    std::vector<Fiber*> fibers;
    std::vector<unsigned char*> stacks;
    void grow(size_t n) {
        while (fibers.size() < n) {
            void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (stack == MAP_FAILED) abort();
            stacks.push_back(static_cast<unsigned char*>(stack));
            fibers.push_back(new Fiber());
        }
    }
};
inline Pool pool;

inline void prepare(Block& block, size_t first_fiber) {
    const unsigned threads = block.size.x;
    pool.grow(first_fiber + threads);
    block.arrived = block.done = 0;
    block.fibers.resize(threads);
    block.warps.resize(threads / LANES);
    for (unsigned i = 0; i < threads; i++) {
        Fiber* fiber = pool.fibers[first_fiber + i];
        start(fiber, pool.stacks[first_fiber + i]);
        fiber->lane = i % LANES;
        fiber->thread = {i, 0, 0};
        fiber->block = &block;
        fiber->warp = &block.warps[i / LANES];
        block.fibers[i] = fiber;
        block.warps[i / LANES].fibers[i % LANES] = fiber;
        block.warps[i / LANES].arrived = 0;
    }
}

// Says which kernel touched memory that is not there; the fault then happens again, to the end of the process.
inline void on_fault(int signal_number) {
    char message[160];
    const int length = snprintf(message, sizeof(message), "%s: invalid memory access by thread %u of block %u,%u,%u\n",
                                current->block->entry->name, current->thread.x, current->block->index.x,
                                current->block->index.y, current->block->index.z);
    if (write(2, message, static_cast<size_t>(length)) < 0) abort();
    signal(signal_number, SIG_DFL);
}

inline const char* launch(const Launch* launches, unsigned num_launches, uint64_t seed) {
    error.clear();
    const auto fault_before = signal(SIGSEGV, on_fault);
    struct Restore {
        void (*before)(int);
        ~Restore() { signal(SIGSEGV, before); }
    } restore{fault_before};
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
    spins = 0;
    began = time(nullptr);
    std::vector<Block> blocks;
    for (const Launch* l = launches; l < launches + num_launches; l++) {
        const Entry* entry = entries;
        while (entry && strcmp(entry->name, l->kernel) != 0) entry = entry->next;
        if (!entry) error = std::string("no kernel ") + l->kernel;
        else if (entry->num_arguments != l->num_arguments)
            error = std::string(l->kernel) + " takes " + std::to_string(entry->num_arguments) + " arguments";
        else if (l->threads == 0 || l->threads % LANES != 0 || l->threads > entry->max_threads)
            error = std::string(l->kernel) + " does not run with " + std::to_string(l->threads) + " threads a block";
        if (!error.empty()) return error.c_str();
        for (unsigned z = 0; z < l->grid.z; z++) for (unsigned y = 0; y < l->grid.y; y++) for (unsigned x = 0; x < l->grid.x; x++)
            blocks.push_back(Block{{x, y, z}, {l->threads, 1, 1}, l->grid, entry, l, 0, 0, {}, {}});
    }
    // Blocks run one after another, and those that sum over ranks wait for their likes in other processes: there, all in one order.
    if (num_launches > 1 || !strstr(launches->kernel, "all_reduce")) shuffle(blocks);
    const unsigned shared_bytes = launches->shared_bytes, guard = 256;
    std::vector<unsigned char> memory(shared_bytes + guard + 128);
    dynamic_shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
    std::vector<Block*> together;
    if (num_launches > 1) {
        size_t first = 0;
        for (Block& block : blocks) {
            prepare(block, first);
            first += block.size.x;
            together.push_back(&block);
        }
        run(together);
        return error.empty() ? nullptr : error.c_str();
    }
    for (Block& block : blocks) {
        memset(dynamic_shared, 0xff, shared_bytes + guard);
        if (__start_emulated_shared)
            memset(__start_emulated_shared, 0xff, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
        prepare(block, 0);
        together.assign(1, &block);
        run(together);
        for (unsigned i = 0; error.empty() && i < guard; i++)
            if (dynamic_shared[shared_bytes + i] != 0xff) error = "writes past its shared memory";
        if (!error.empty()) return error.c_str();
        block.fibers = {};
        block.warps = {};
    }
    return nullptr;
}

template <class T>
T argument(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class... T, size_t... I>
void call_with(void (*kernel)(T...), const uint64_t* arguments, std::index_sequence<I...>) {
    kernel(argument<T>(arguments[I])...);
}
template <class... T>
constexpr unsigned count(void (*)(T...)) { return sizeof...(T); }
template <class... T>
void call_unpacked(void (*kernel)(T...), const uint64_t* arguments) {
    call_with(kernel, arguments, std::index_sequence_for<T...>{});
}
template <auto KERNEL_FUNCTION>
void call(const uint64_t* arguments) { call_unpacked(KERNEL_FUNCTION, arguments); }
struct Register {
    Entry entry;
    Register(const char* name, unsigned threads, unsigned arguments, Call function)
        : entry{name, threads, arguments, function, entries} { entries = &entry; }
};

}  // namespace emulate

// The error of a launch, or null. Not for two threads at once.
extern "C" inline __attribute__((used, visibility("default"))) const char*
tandem_emulate(const emulate::Launch* launches, unsigned num_launches, uint64_t seed) {
    return emulate::launch(launches, num_launches, seed);
}

#define threadIdx (emulate::current->thread)
#define blockIdx (emulate::current->block->index)
#define blockDim (emulate::current->block->size)
#define gridDim (emulate::current->block->grid)

#define DEVICE static inline
#define METHOD inline
#define __shared__ __attribute__((section("emulated_shared"))) static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define KERNEL(name, threads, ...)                                                                             \
    static void name(__VA_ARGS__);                                                                             \
    static emulate::Register name##_entry(#name, threads, emulate::count(&name), &emulate::call<&name>);       \
    static void name(__VA_ARGS__)
#define KERNEL_RESIDENT(name, threads, blocks, ...) KERNEL(name, threads, __VA_ARGS__)
#define DYNAMIC_SHARED(name) unsigned char* name = emulate::dynamic_shared

inline unsigned bits_of(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float float_of(unsigned x) { float y; memcpy(&y, &x, 4); return y; }

inline void wait_for_previous_launch() { emulate::current->has_waited = true; }
inline void sync_block() { emulate::barrier(); }
inline void sync_warp() {
    emulate::together<char, char>("sync_warp", 0, [](emulate::Warp&) {});
}

template <class F>
unsigned shuffle_by(const char* name, unsigned x, int by, F source) {
    struct In { unsigned x; int by; };
    return emulate::together<In, unsigned>(name, In{x, by}, [source](emulate::Warp& warp) {
        for (unsigned lane = 0; lane < emulate::LANES; lane++) {
            const unsigned from = source(lane, static_cast<unsigned>(emulate::get<In>(warp, lane).by));
            emulate::put(warp, lane, emulate::get<In>(warp, from % emulate::LANES).x);
        }
    });
}
inline unsigned shuffle_xor(unsigned x, int lanes) {
    return shuffle_by("shuffle_xor", x, lanes, [](unsigned lane, unsigned by) { return lane ^ by; });
}
inline unsigned shuffle_from(unsigned x, int lane) {
    return shuffle_by("shuffle_from", x, lane, [](unsigned, unsigned from) { return from; });
}
inline unsigned shuffle_up(unsigned x, int lanes) {
    return shuffle_by("shuffle_up", x, lanes, [](unsigned lane, unsigned by) { return lane >= by ? lane - by : lane; });
}
inline bool any_lane(bool x) {
    return emulate::together<bool, bool>("any_lane", x, [](emulate::Warp& warp) {
        bool any = false;
        for (unsigned lane = 0; lane < emulate::LANES; lane++) any |= emulate::get<bool>(warp, lane);
        for (unsigned lane = 0; lane < emulate::LANES; lane++) emulate::put(warp, lane, any);
    });
}

inline uint4 load16(const void* p) { return emulate::load<uint4>(p); }
inline uint2 load8(const void* p) { return emulate::load<uint2>(p); }
inline unsigned load4(const void* p) { return emulate::load<unsigned>(p); }
inline void store16(void* p, uint4 x) { emulate::store(p, x); }
inline void store8(void* p, uint2 x) { emulate::store(p, x); }
inline void store4(void* p, unsigned x) { emulate::store(p, x); }
inline uint4 stream16(const void* p) { return load16(p); }
inline uint2 stream8(const void* p) { return load8(p); }
inline uint4 pass16(const void* p) { return load16(p); }
inline uint2 pass8(const void* p) { return load8(p); }
inline unsigned stream4(const void* p) { return load4(p); }

inline unsigned short bf16_of(float x) {
    const unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline unsigned bf16x2_of(float low, float high) { return bf16_of(low) | static_cast<unsigned>(bf16_of(high)) << 16; }
inline unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
    return bf16x2_of(fmaf(float_of(a << 16), float_of(b << 16), float_of(c << 16)),
                     fmaf(float_of(a & 0xffff0000u), float_of(b & 0xffff0000u), float_of(c & 0xffff0000u)));
}
template <unsigned SELECTOR>
unsigned permute_bytes(unsigned a, unsigned b) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned y = 0;
    for (int i = 0; i < 4; i++) y |= static_cast<unsigned>(bytes >> 8 * (SELECTOR >> 4 * i & 7) & 0xff) << 8 * i;
    return y;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log_exact(float x) { return logf(x); }
inline float exp_exact(float x) { return expf(x); }
inline float rsqrt_exact(float x) { return 1.0f / sqrtf(x); }
inline float divide_fast(float a, float b) { return a / b; }
inline float mul_rounded(float a, float b) { return a * b; }
inline float add_rounded(float a, float b) { return a + b; }
inline unsigned multiply_high(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline void cp_async16(void* shared, const void* global, bool valid) {
    emulate::need_aligned(shared, 16);
    if (valid) emulate::need_aligned(global, 16);
    memset(shared, 0xff, 16);
    emulate::current->copies.push_back({shared, global, valid, emulate::current->groups});
}
inline void cp_async_commit() { emulate::current->groups++; }
template <int N>
void cp_async_wait() {
    emulate::Fiber& fiber = *emulate::current;
    size_t kept = 0;
    for (const emulate::Copy& copy : fiber.copies) {
        if (copy.group >= fiber.groups - N) fiber.copies[kept++] = copy;
        else if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    fiber.copies.resize(kept);
}

inline void ldmatrix(unsigned (&r)[4], const void* row, bool trans) {
    struct Out { unsigned r[4]; };
    const Out out = emulate::together<const void*, Out>("ldmatrix", row, [trans](emulate::Warp& warp) {
        Out all[32];
        for (unsigned matrix = 0; matrix < 4; matrix++) {
            unsigned banks = 0;
            unsigned short m[8][8];
            for (unsigned i = 0; i < 8; i++) {
                const void* at = emulate::get<const void*>(warp, 8 * matrix + i);
                emulate::need_aligned(at, 16);
                memcpy(m[i], at, 16);
                banks |= 1u << reinterpret_cast<uintptr_t>(at) / 16 % 8;
            }
            if (banks != 0xff) emulate::fail("rows of ldmatrix share banks");
            for (unsigned lane = 0; lane < 32; lane++) {
                const unsigned g = lane / 4, t = lane % 4;
                const unsigned low = trans ? m[2 * t][g] : m[g][2 * t], high = trans ? m[2 * t + 1][g] : m[g][2 * t + 1];
                all[lane].r[matrix] = low | high << 16;
            }
        }
        for (unsigned lane = 0; lane < 32; lane++) emulate::put(warp, lane, all[lane]);
    });
    memcpy(r, out.r, 16);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { ldmatrix(r, row, true); }

inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct In { float c[4]; unsigned a[4], b[2]; };
    struct Out { float c[4]; };
    In in;
    memcpy(in.c, c, 16);
    memcpy(in.a, a, 16);
    in.b[0] = b0;
    in.b[1] = b1;
    const Out out = emulate::together<In, Out>("mma", in, [](emulate::Warp& warp) {
        float x[16][16], y[16][8], z[16][8];
        const auto low = [](unsigned pair) { return float_of(pair << 16); };
        const auto high = [](unsigned pair) { return float_of(pair & 0xffff0000u); };
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned g = lane / 4, t = lane % 4;
            const In in = emulate::get<In>(warp, lane);
            for (unsigned i = 0; i < 4; i++) {
                const unsigned row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
                x[row][column] = low(in.a[i]);
                x[row][column + 1] = high(in.a[i]);
                z[g + 8 * (i / 2)][2 * t + i % 2] = in.c[i];
            }
            for (unsigned i = 0; i < 2; i++) {
                y[2 * t + 8 * i][g] = low(in.b[i]);
                y[2 * t + 8 * i + 1][g] = high(in.b[i]);
            }
        }
        for (unsigned row = 0; row < 16; row++)
            for (unsigned k = 0; k < 16; k++)
                for (unsigned column = 0; column < 8; column++) z[row][column] += x[row][k] * y[k][column];
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned g = lane / 4, t = lane % 4;
            emulate::put(warp, lane, Out{{z[g][2 * t], z[g][2 * t + 1], z[g + 8][2 * t], z[g + 8][2 * t + 1]}});
        }
    });
    memcpy(c, out.c, 16);
}

inline void atomic_max(unsigned long long* p, unsigned long long x) { if (x > *p) *p = x; }
inline void atomic_add(unsigned long long* p, unsigned long long x) { *p += x; }
inline unsigned fetch_add(unsigned* p, unsigned x) { const unsigned before = *p; *p += x; return before; }
inline void fence_device() {}
inline void store_release(unsigned* p, unsigned x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
inline unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline uint4 load16_volatile(const void* p) { return load16(p); }
inline void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void spin_pause() {
    if (++emulate::spins % 256 == 0) sched_yield();
    emulate::yield();
}
