// Stands in for cuBLASLt in tests: multiplies exactly what the descriptions say lies at the addresses, column by column, on the
// stand-in driver's queue. Five algorithms with times of their own; the fourth never runs, and the third, the fastest, refuses
// products of 7 columns.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { F32 = 0, BF16 = 14, E4M3 = 28 };

static long long heuristics, products, refusals, own_choices;
#define COUNTERS(X) X(heuristics) X(products) X(refusals) X(own_choices)
long long stub_counter(const char *name) {
#define X(c) if (!strcmp(name, #c)) return c;
    COUNTERS(X)
#undef X
    return -1;
}
void stub_set(const char *name, long long value) {}

typedef struct { int compute, scale, transa, transb, mode_a, mode_b; const float *scale_a, *scale_b; int8_t fast; } Desc;
typedef struct { int type; uint64_t rows, cols; int64_t ld; } Layout;
typedef struct { uint64_t data[8]; } Algorithm;
typedef struct { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; } Result;

size_t cublasLtGetVersion(void) { const char *v = getenv("STUB_CUBLASLT_VERSION"); return v ? atoi(v) : 130000; }
int cublasLtCreate(void **handle) { *handle = malloc(1); return OK; }
int cublasLtDestroy(void *handle) { free(handle); return OK; }

int cublasLtMatmulDescCreate(void **out, int compute, int scale) {
    Desc d = {compute, scale};
    *out = memcpy(malloc(sizeof d), &d, sizeof d);
    return OK;
}
int cublasLtMatmulDescDestroy(void *desc) { free(desc); return OK; }
int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes) {
    Desc *d = desc;
    struct { int attribute; void *to; size_t bytes; } table[] = {
        {3, &d->transa, 4}, {4, &d->transb, 4}, {17, &d->scale_a, 8}, {18, &d->scale_b, 8}, {25, &d->fast, 1},
        {31, &d->mode_a, 4}, {32, &d->mode_b, 4},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].attribute == attribute && table[i].bytes == bytes) { memcpy(table[i].to, value, bytes); return OK; }
    return INVALID_VALUE;
}
typedef struct { uint64_t workspace; uint32_t alignment[4]; } Preference;
int cublasLtMatmulPreferenceCreate(void **out) {
    *out = calloc(1, sizeof(Preference));
    for (int i = 0; i < 4; i++) ((Preference *)*out)->alignment[i] = 256;
    return OK;
}
int cublasLtMatmulPreferenceDestroy(void *preference) { free(preference); return OK; }
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes) {
    Preference *p = preference;
    if (attribute == 1 && bytes == 8) memcpy(&p->workspace, value, 8);
    else if (attribute >= 5 && attribute <= 8 && bytes == 4) memcpy(&p->alignment[attribute - 5], value, 4);
    else return INVALID_VALUE;
    return OK;
}
int cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    Layout l = {type, rows, cols, ld};
    *out = memcpy(malloc(sizeof l), &l, sizeof l);
    return OK;
}
int cublasLtMatrixLayoutDestroy(void *layout) { free(layout); return OK; }
int cublasLtMatrixLayoutSetAttribute(void *layout, int attribute, const void *value, size_t bytes) {
    if (attribute != 3 || bytes != 8) return INVALID_VALUE;
    memcpy(&((Layout *)layout)->cols, value, 8);
    return OK;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int asked,
                                   Result *results, int *count) {
    heuristics++;
    // Larger products than the tests' own have none.
    if (((Layout *)a)->rows == 4096) return NOT_SUPPORTED;
    size_t allowed = ((Preference *)preference)->workspace;
    // Operands of the tests start on multiples of 16.
    for (int i = 0; i < 4; i++)
        if (((Preference *)preference)->alignment[i] > 16) return NOT_SUPPORTED;
    *count = 0;
    for (int i = 0; i < 5 && *count < asked; i++) {
        size_t workspace = i == 4 ? 64 << 20 : 1 << 20;   // the fifth, faster still, wants more than there is
        if (workspace > allowed) continue;
        results[(*count)++] = (Result){{{i + 1}}, workspace, OK, 1};
    }
    return OK;
}

static float value(const void *at, int type, size_t i) {
    if (type == F32) return ((const float *)at)[i];
    if (type == BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
        float f;
        return memcpy(&f, &bits, 4), f;
    }
    uint8_t byte = ((const uint8_t *)at)[i];
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float f = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return byte & 128 ? -f : f;
}
static void store(void *at, int type, size_t i, float f) {
    if (type == F32) { ((float *)at)[i] = f; return; }
    uint32_t bits;
    memcpy(&bits, &f, 4);
    ((uint16_t *)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

typedef struct { Desc desc; Layout la, lb, ld; const void *a, *b; void *d; } Product;
static void multiply(void *data) {
    Product *p = data;
    products++;
    for (uint64_t j = 0; j < p->ld.cols; j++)
        for (uint64_t i = 0; i < p->ld.rows; i++) {
            float sum = 0;
            for (uint64_t k = 0; k < p->la.rows; k++)
                sum += value(p->a, p->la.type, k + i * p->la.ld) * value(p->b, p->lb.type, k + j * p->lb.ld);
            if (p->desc.scale_a) sum *= p->desc.scale_a[p->desc.mode_a == 3 ? i : 0];
            if (p->desc.scale_b) sum *= p->desc.scale_b[p->desc.mode_b == 3 ? j : 0];
            store(p->d, p->ld.type, i + j * p->ld.ld, sum);
        }
}

int cublasLtMatmul(void *handle, void *desc, const float *alpha, const void *a, Layout *la, const void *b, Layout *lb,
                   const float *beta, const void *c, Layout *lc, void *d, Layout *ld, const Algorithm *algorithm, void *workspace,
                   size_t workspace_bytes, void *stream) {
    static int (*enqueue)(void (*)(void *), const void *, size_t, float);
    if (!enqueue) enqueue = dlsym(dlopen("libcuda.so", RTLD_NOW), "stub_enqueue");
    Product p = {*(Desc *)desc, *la, *lb, *ld, a, b, d};
    // The only form that Tandem describes: transposed times plain, sums in f32, nothing added.
    if (p.desc.transa != 1 || p.desc.transb != 0 || p.desc.compute != 68 || p.desc.scale != F32) return INVALID_VALUE;
    if (*alpha != 1 || *beta != 0 || la->rows != lb->rows || la->cols != ld->rows || lb->cols != ld->cols) return INVALID_VALUE;
    if ((la->type == E4M3) != (p.desc.scale_a && p.desc.scale_b)) return INVALID_VALUE;
    if (la->type == E4M3 && (la->rows % 16 || ld->rows % 16)) return NOT_SUPPORTED;
    if (workspace_bytes < 1 << 20) return INVALID_VALUE;
    static const float us[] = {30, 20, 10, 1, 5};
    int which = algorithm ? (int)algorithm->data[0] - 1 : 0;
    own_choices += !algorithm;
    if (which == 3 || (which == 2 && lb->cols == 7)) { refusals++; return NOT_SUPPORTED; }
    return enqueue(multiply, &p, sizeof p, us[which]) ? INVALID_VALUE : OK;
}
