// Stands in for NVRTC in tests: an image is "STUBCUBIN", the options and the source; a source with "#error" does not compile.
// Where STUB_EMULATE names the header that lets kernels run on a CPU, an image is a shared library, made by the system's C++
// compiler, which the stand-in driver runs.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char *source, *image; size_t bytes; char log[4096]; } Program;
static _Atomic long long compiles;   // from several threads

long long stub_counter(const char *name) { return strcmp(name, "compiles") ? -1 : compiles; }
void stub_set(const char *name, long long value) {}

int nvrtcVersion(int *major, int *minor) {
    const char *version = getenv("STUB_NVRTC_VERSION");
    sscanf(version ? version : "13.0", "%d.%d", major, minor);
    return 0;
}
int nvrtcCreateProgram(void **out, const char *source, const char *name, int n, const char **headers, const char **names) {
    Program *p = calloc(1, sizeof *p);
    p->source = strdup(source);
    *out = p;
    return 0;
}
int nvrtcDestroyProgram(void **program) {
    Program *p = *program;
    free(p->source);
    free(p->image);
    free(p);
    return 0;
}
// The source as a shared library.
static int compile_for_cpu(Program *p, const char *header) {
    char folder[] = "/tmp/tandem-emulate-XXXXXX", command[4096], path[256];
    if (!mkdtemp(folder)) return 1;
    snprintf(path, sizeof path, "%s/source.cu", folder);
    FILE *file = fopen(path, "w");
    fputs(p->source, file);
    fclose(file);
    const char *compiler = getenv("CXX");
    snprintf(command, sizeof command,
             "'%s' -std=c++20 -O2 -shared -fPIC -fno-strict-aliasing -Wno-unknown-pragmas -include '%s' -x c++ %s/source.cu "
             "-o %s/library.so 2> %s/log", compiler ? compiler : "c++", header, folder, folder, folder);
    int failed = system(command);
    snprintf(path, sizeof path, "%s/%s", folder, failed ? "log" : "library.so");
    file = fopen(path, "r");
    if (failed) {
        p->log[fread(p->log, 1, sizeof p->log - 1, file)] = 0;
    } else {
        fseek(file, 0, SEEK_END);
        p->bytes = ftell(file);
        p->image = malloc(p->bytes);
        rewind(file);
        if (fread(p->image, 1, p->bytes, file) != p->bytes) failed = 1;
    }
    fclose(file);
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command) || failed ? 6 : 0;
}
int nvrtcCompileProgram(void *program, int n, const char **options) {
    Program *p = program;
    compiles++;
    if (n < 1 || strncmp(options[0], "--gpu-architecture=", 19)) return 5;
    const char *error = strstr(p->source, "#error");
    if (error) {
        snprintf(p->log, sizeof p->log, "stub: error: %.40s", error);
        return 6;
    }
    const char *header = getenv("STUB_EMULATE");
    if (header) return compile_for_cpu(p, header);
    p->image = malloc(strlen(p->source) + strlen(options[0]) + 16);
    p->bytes = sprintf(p->image, "STUBCUBIN %s\n%s", options[0], p->source) + 1;
    return 0;
}
int nvrtcGetCUBINSize(void *program, size_t *size) { *size = ((Program *)program)->bytes; return 0; }
int nvrtcGetCUBIN(void *program, char *out) { memcpy(out, ((Program *)program)->image, ((Program *)program)->bytes); return 0; }
int nvrtcGetPTXSize(void *program, size_t *size) { return nvrtcGetCUBINSize(program, size); }
int nvrtcGetPTX(void *program, char *out) { return nvrtcGetCUBIN(program, out); }
int nvrtcGetProgramLogSize(void *program, size_t *size) { *size = strlen(((Program *)program)->log) + 1; return 0; }
int nvrtcGetProgramLog(void *program, char *out) { strcpy(out, ((Program *)program)->log); return 0; }
