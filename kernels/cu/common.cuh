// What every kernel file starts with: the host puts this text in front of each of them. No toolkit header is included.
//
// All inline PTX and every builtin of the machine is behind a small function of the section "machine", so that
// `emulate.h` can stand in for a GPU: there the same kernels run on the CPU, a block's threads as fibers.
//
// Storage types: bf16 and fp8 (e4m3) are kept as integers and turned into f32 for arithmetic. Shape letters are those of
// the whole project: T tokens, S sequences, H query heads, K KV heads, D head dim, E hidden, I intermediate, V vocabulary.

typedef unsigned char fp8;
typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

static constexpr int WARP = 32;
// Slots of a KV block.
static constexpr int BLOCK_SIZE = 16;
static constexpr float LOG2_E = 1.4426950408889634f;

#ifndef TANDEM_EMULATE

// ---------------------------------------------------------------------------------------------------- machine

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
// A kernel, its largest block, and its parameters.
#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// The same, with registers for this many blocks on a multiprocessor.
#define KERNEL_RESIDENT(name, threads, blocks, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// Memory whose size is given at launch.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// Before the first read of what an earlier launch wrote, and before the first write. Where the host launches with
// programmatic stream serialization (sm_90 on), blocks begin while the launch before still runs, and wait here until it is
// over; otherwise this does nothing. Every thread calls it, so that a launch is not over before those it builds on.
DEVICE void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE u32 shuffle_xor(u32 x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE u32 shuffle_from(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 shuffle_up(u32 x, int lanes) { return __shfl_up_sync(0xffffffffu, x, lanes); }

DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// 16 bytes of something that is read again soon; `p` is aligned.
DEVICE uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
DEVICE uint2 load8(const void* p) { return *reinterpret_cast<const uint2*>(p); }
DEVICE u32 load4(const void* p) { return *reinterpret_cast<const u32*>(p); }
DEVICE void store16(void* p, uint4 x) { *reinterpret_cast<uint4*>(p) = x; }
DEVICE void store8(void* p, uint2 x) { *reinterpret_cast<uint2*>(p) = x; }
DEVICE void store4(void* p, u32 x) { *reinterpret_cast<u32*>(p) = x; }

// 16, 8 or 4 bytes of weights, read once a step: they must not push activations out of the L1 cache.
DEVICE uint4 stream16(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
DEVICE uint2 stream8(const void* p) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}
// Half of a sector: the neighbour's request comes right behind, so this one stays in L1.
DEVICE u32 stream4(const void* p) {
    u32 x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

// As stream16 and stream8, of what an earlier launch may have written while this one already waited for it.
DEVICE uint4 pass16(const void* p) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
DEVICE uint2 pass8(const void* p) {
    uint2 x;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

DEVICE bf16 bf16_of(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Two bf16 in a register, the first in the low half.
DEVICE u32 bf16x2_of(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// a · b + c of pairs, rounded once; also of subnormal numbers.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
// Bytes of the pair (a, b): 0–3 are those of a, 4–7 those of b; the selector's lowest nibble gives the lowest byte.
template <u32 SELECTOR>
DEVICE u32 permute_bytes(u32 a, u32 b) { return __byte_perm(a, b, SELECTOR); }

#if __CUDA_ARCH__ >= 890
DEVICE fp8 fp8_of(float x) {
    unsigned short y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
    return static_cast<fp8>(y);
}
#else
#define PLAIN_FP8
#endif

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log_exact(float x) { return logf(x); }
DEVICE float exp_exact(float x) { return expf(x); }
DEVICE float rsqrt_exact(float x) { return 1.0f / sqrtf(x); }
DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
// Rounded after each operation, where a fused one would give another result than the CPU backend.
DEVICE float mul_rounded(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }

// Copies 16 bytes, or zeros if `valid` is false, from global to shared memory in the background.
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N.
template <int N>
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8×8 matrices of bf16 whose rows are at the addresses of lanes 0–7, 8–15, 16–23, 24–31.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// c += a·b on the tensor cores: a is 16 × 16, b is 16 × 8, both bf16. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: row g, columns 2t, 2t+1   a[1]: row g+8   a[2]: row g, columns 2t+8, 2t+9   a[3]: row g+8 of those
//   b[0]: rows 2t, 2t+1 of column g   b[1]: rows 2t+8, 2t+9
//   c[0], c[1]: row g, columns 2t, 2t+1   c[2], c[3]: row g+8
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void atomic_max(u64* p, u64 x) { atomicMax(p, x); }
DEVICE void atomic_add(u64* p, u64 x) { atomicAdd(p, x); }
// Adds, and gives what was there before.
DEVICE u32 fetch_add(u32* p, u32 x) { return atomicAdd(p, x); }
// What this thread wrote before is seen by other blocks before what it writes afterwards.
DEVICE void fence_device() { __threadfence(); }

// Flags between devices.
DEVICE void store_release(u32* p, u32 x) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE u32 load_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
// Data that another device wrote during this kernel: past the L1 cache.
DEVICE uint4 load16_volatile(const void* p) {
    uint4 x;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}
DEVICE void fence_system() { __threadfence_system(); }
DEVICE void spin_pause() {}

#endif  // TANDEM_EMULATE

// --------------------------------------------------------------------------------------------------- numbers

DEVICE float infinity() { return float_of(0x7f800000u); }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }
DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }
DEVICE float max_of(float a, float b) { return a > b ? a : b; }
DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

DEVICE float f32_of(bf16 x) { return float_of(static_cast<u32>(x) << 16); }
DEVICE float f32_of_low(u32 pair) { return float_of(pair << 16); }
DEVICE float f32_of_high(u32 pair) { return float_of(pair & 0xffff0000u); }

// Eight bf16 of 16 bytes.
DEVICE void unpack8(float (&x)[8], uint4 packed) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = f32_of_low(words[i]);
        x[2 * i + 1] = f32_of_high(words[i]);
    }
}
DEVICE uint4 pack8(const float (&x)[8]) {
    return uint4{bf16x2_of(x[0], x[1]), bf16x2_of(x[2], x[3]), bf16x2_of(x[4], x[5]), bf16x2_of(x[6], x[7])};
}

DEVICE void load_f32x8(float (&x)[8], const float* p) {
    const uint4 a = load16(p), b = load16(p + 4);
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = float_of(words[i]);
}
DEVICE void store_f32x8(float* p, const float (&x)[8]) {
    store16(p, uint4{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
    store16(p + 4, uint4{bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])});
}

DEVICE float silu(float x) { return divide_fast(x, 1.0f + exp2_fast(-x * LOG2_E)); }

// Two e4m3 in the low and the high byte's places of two bf16: e4m3's bits moved to the top are a bf16 that is 2¹²⁰ times
// too small, subnormal ones included. Exact; the two NaN codes of e4m3 become ±480, so writers of fp8 must not make them.
DEVICE u32 bf16x2_of_fp8_places(u32 places) {
    // The sum with -0 keeps the sign of a zero.
    return fma_bf16x2((places & 0x80008000u) | ((places & 0x7f007f00u) >> 4), 0x7b807b80u, 0x80008000u);
}
// Four e4m3 as two pairs of bf16, in order.
DEVICE uint2 bf16x4_of_fp8(u32 four) {
    return uint2{bf16x2_of_fp8_places(permute_bytes<0x1404>(four, 0)), bf16x2_of_fp8_places(permute_bytes<0x3424>(four, 0))};
}

#ifdef PLAIN_FP8
// To the nearest e4m3, ties to even, at most ±448.
DEVICE fp8 fp8_of(float x) {
    const u32 bits = bits_of(x), sign = bits >> 24 & 0x80;
    u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    // 464 is half way between 448 and what would be 480.
    if (magnitude >= 0x43e80000u) return static_cast<fp8>(sign | 0x7e);
    if (magnitude < 0x3c800000u) {
        // Below 2⁻⁶ the step is 2⁻⁹: adding 2¹⁴ leaves a multiple of it in the low bits, rounded.
        const u32 steps = bits_of(add_rounded(float_of(magnitude), 16384.0f)) - bits_of(16384.0f);
        return static_cast<fp8>(sign | steps);
    }
    magnitude += 0x7ffff + (magnitude >> 20 & 1);
    return static_cast<fp8>(sign | ((magnitude >> 20) - (120 << 3)));
}
#endif

// f16 of GGUF's scales, by integers.
DEVICE float f32_of_f16(unsigned short x) {
    const u32 sign = static_cast<u32>(x & 0x8000) << 16, magnitude = x & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

// An order of floats by unsigned integers; both zeros are equal, every NaN is above +∞.
DEVICE u32 ordered_bits(float x) {
    const u32 bits = bits_of(x == 0.0f ? 0.0f : x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of_ordered(u32 ordered) {
    return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// ------------------------------------------------------------------------------------------------ reductions

DEVICE float shuffle_from(float x, int lane) { return float_of(shuffle_from(bits_of(x), lane)); }
DEVICE float shuffle_xor(float x, int lanes) { return float_of(shuffle_xor(bits_of(x), lanes)); }
DEVICE u64 shuffle_xor(u64 x, int lanes) {
    const u32 low = shuffle_xor(static_cast<u32>(x), lanes), high = shuffle_xor(static_cast<u32>(x >> 32), lanes);
    return static_cast<u64>(high) << 32 | low;
}

struct Sum {
    template <class T>
    METHOD T operator()(T a, T b) const { return a + b; }
};
struct Max {
    template <class T>
    METHOD T operator()(T a, T b) const { return a > b ? a : b; }
};

// The same value in every lane.
template <class T, class F>
DEVICE T warp_reduce(T x, F f) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = f(x, shuffle_xor(x, lanes));
    return x;
}

// The same value in every thread, always in the same order. `scratch` holds a value per warp and may be used again after
// the next barrier.
template <class T, class F>
DEVICE T block_reduce(T x, F f, T* scratch) {
    const int warp = threadIdx.x / WARP, num_warps = blockDim.x / WARP;
    x = warp_reduce(x, f);
    if (threadIdx.x % WARP == 0) scratch[warp] = x;
    sync_block();
    x = scratch[0];
    for (int i = 1; i < num_warps; i++) x = f(x, scratch[i]);
    return x;
}

// The sequence that a token of the step belongs to: the last with cu_seqlens[s] <= token (empty ones are passed over).
DEVICE int sequence_of(const int* cu_seqlens, int num_sequences, int token) {
    int low = 0, high = num_sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (cu_seqlens[middle] <= token) low = middle; else high = middle;
    }
    return low;
}

// -------------------------------------------------------------------------------------------- rows of logits

// Larger the earlier a token stands in descending order of logits, equal ones by ascending id.
DEVICE u64 key_of(float logit, u32 token) { return static_cast<u64>(ordered_bits(logit)) << 32 | ~token; }
DEVICE float logit_of(u64 key) { return float_of_ordered(static_cast<u32>(key >> 32)); }
DEVICE u32 token_of(u64 key) { return ~static_cast<u32>(key); }

// Calls f(token, logit) for this thread's share of the row. Loads go out eight at a time: one after the other, a pass would
// be nothing but waiting for the L2 cache.
template <int THREADS, class F>
DEVICE void for_each_logit(const float* row, int vocab_size, F f) {
    constexpr int AT_ONCE = 8;
    int token = threadIdx.x;
    for (; token + (AT_ONCE - 1) * THREADS < vocab_size; token += AT_ONCE * THREADS) {
        float x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = row[token + i * THREADS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) f(token + i * THREADS, x[i]);
    }
    for (; token < vocab_size; token += THREADS) f(token, row[token]);
}

// ----------------------------------------------------------------------------------------------- random bits

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
DEVICE uint4 philox(u64 key, uint4 x) {
    u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 a_high = multiply_high(0xd2511f53u, x.x), a_low = 0xd2511f53u * x.x;
        const u32 b_high = multiply_high(0xcd9e8d57u, x.z), b_low = 0xcd9e8d57u * x.z;
        x = uint4{b_high ^ x.y ^ k0, b_low, a_high ^ x.w ^ k1, a_low};
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return x;
}
