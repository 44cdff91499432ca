// Stands in for NVML in tests: two GPUs, in another order than CUDA's.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
static const char *uuids[] = {"GPU-02020202-0202-0202-0202-020202020202", "GPU-01010101-0101-0101-0101-010101010101"};
static const char *buses[] = {"0000:01:00.0", "0000:00:00.0"};

int nvmlInit_v2(void) { return OK; }
int nvmlShutdown(void) { return OK; }
int nvmlSystemGetDriverVersion(char *version, unsigned len) { snprintf(version, len, "580.00"); return OK; }
static int find(const char **names, const char *name, uintptr_t *device) {
    for (uintptr_t i = 0; i < 2; i++)
        if (!strcmp(names[i], name)) { *device = i + 1; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, uintptr_t *device) { return find(uuids, uuid, device); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, uintptr_t *device) { return find(buses, bus, device); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, uintptr_t *device) { *device = index + 1; return OK; }
int nvmlDeviceGetMigMode(uintptr_t device, unsigned *current, unsigned *pending) {
    *current = *pending = getenv("STUB_MIG") != NULL;
    return OK;
}
int nvmlDeviceGetIndex(uintptr_t device, unsigned *index) { *index = device - 1; return OK; }
int nvmlDeviceGetUtilizationRates(uintptr_t device, unsigned *rates) { rates[0] = 25 * device; rates[1] = 99; return OK; }
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
int nvmlDeviceGetMemoryInfo_v2(uintptr_t device, Memory *memory) {
    memory->total = 1000 * device;
    memory->used = 400 * device;
    return OK;
}
