/* A stand-in for libnvidia-ml.so.1: the NVML functions that glmplan.node.nvml reaches through pynvml.
 *
 * Answers come from the file named by FAKE_NVML_FACTS, one "key=value" per line:
 *   numbers are decimal, several are separated by blanks; "!3" makes the call return NVML error 3;
 *   a key that is absent makes the call return NVML_ERROR_NOT_SUPPORTED.
 * With FAKE_NVML_CALLS set, the name of every call is appended to that file.
 * Signatures, codes and structs follow nvml.h; the struct sizes are compared with pynvml's in test_nvml.py.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef unsigned long long u64;

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    ARGUMENT_VERSION_MISMATCH = 25,
};

typedef struct { u64 total, free, used; } nvmlMemory_t;
typedef struct { unsigned version; u64 total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { unsigned pid; u64 usedGpuMemory; unsigned gpuInstanceId, computeInstanceId; } nvmlProcessInfo_t;
typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;
typedef struct nvmlDevice_st { int index; } *nvmlDevice_t;

enum { MAX_GPUS = 16, MAX_NUMBERS = 128 };
static const unsigned MEMORY_V2 = sizeof(nvmlMemory_v2_t) | 2u << 24;

static char *facts;
static int started;
static struct nvmlDevice_st devices[MAX_GPUS];

unsigned fake_sizeof_memory(void) { return sizeof(nvmlMemory_t); }
unsigned fake_sizeof_memory_v2(void) { return sizeof(nvmlMemory_v2_t); }
unsigned fake_sizeof_process(void) { return sizeof(nvmlProcessInfo_t); }
unsigned fake_sizeof_pci(void) { return sizeof(nvmlPciInfo_t); }

static void note(const char *call)
{
    const char *path = getenv("FAKE_NVML_CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file)
        return;
    fprintf(file, "%s\n", call);
    fclose(file);
}

static void load(void)
{
    const char *path = getenv("FAKE_NVML_FACTS");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) {
        fprintf(stderr, "fake_nvml: cannot read FAKE_NVML_FACTS=%s\n", path ? path : "(unset)");
        abort();
    }
    size_t capacity = 1 << 20;
    free(facts);
    facts = malloc(capacity);
    facts[fread(facts, 1, capacity - 1, file)] = '\0';
    fclose(file);
}

/* The text after "key=", copied up to the end of its line. */
static int find(char *value, size_t size, const char *format, va_list arguments)
{
    char key[128];
    vsnprintf(key, sizeof key, format, arguments);
    size_t length = strlen(key);
    for (const char *line = facts; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0 && line[length] == '=') {
            snprintf(value, size, "%.*s", (int)strcspn(line + length + 1, "\n"), line + length + 1);
            return 1;
        }
    }
    return 0;
}

static nvmlReturn_t text(char *out, unsigned size, const char *format, ...)
{
    char value[4096];
    va_list arguments;
    va_start(arguments, format);
    int found = find(value, sizeof value, format, arguments);
    va_end(arguments);
    if (!found)
        return NOT_SUPPORTED;
    if (value[0] == '!')
        return atoi(value + 1);
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

/* Read up to MAX_NUMBERS numbers into out; *count is how many there were. */
static nvmlReturn_t numbers(u64 *out, int *count, const char *format, ...)
{
    char value[4096];
    va_list arguments;
    va_start(arguments, format);
    int found = find(value, sizeof value, format, arguments);
    va_end(arguments);
    *count = 0;
    if (!found)
        return NOT_SUPPORTED;
    if (value[0] == '!')
        return atoi(value + 1);
    for (char *word = strtok(value, " "); word && *count < MAX_NUMBERS; word = strtok(NULL, " "))
        out[(*count)++] = strtoull(word, NULL, 10);
    return SUCCESS;
}

#define ENTER()                   \
    do {                          \
        note(__func__);           \
        if (!started)             \
            return UNINITIALIZED; \
    } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    u64 out[MAX_NUMBERS];
    int count;
    (void)flags;
    note(__func__);
    load();
    nvmlReturn_t code = numbers(out, &count, "init");
    if (code != SUCCESS && code != NOT_SUPPORTED)
        return code;
    started++;
    return SUCCESS;
}

nvmlReturn_t nvmlShutdown(void)
{
    ENTER();
    started--;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code)
{
    static char words[32];
    snprintf(words, sizeof words, "fake error %d", code);
    return words;
}

/* As in the real library, this one answers without nvmlInit. */
nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned size)
{
    note(__func__);
    return facts ? text(out, size, "nvml_version") : UNINITIALIZED;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned size)
{
    ENTER();
    return text(out, size, "driver_version");
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    nvmlReturn_t code = numbers(value, &count, "cuda_version");
    *out = code == SUCCESS ? (int)value[0] : 0;
    return code;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    nvmlReturn_t code = numbers(value, &count, "count");
    *out = code == SUCCESS ? (unsigned)value[0] : 0;
    return code;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    nvmlReturn_t code = numbers(value, &count, "count");
    if (code != SUCCESS || index >= value[0] || index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    code = numbers(value, &count, "gpu.%u.handle", index);
    if (code != SUCCESS && code != NOT_SUPPORTED)
        return code;
    devices[index].index = (int)index;
    *out = &devices[index];
    return SUCCESS;
}

#define DEVICE_TEXT(call, key)                                    \
    nvmlReturn_t call(nvmlDevice_t device, char *out, unsigned size) \
    {                                                             \
        ENTER();                                                  \
        return text(out, size, "gpu.%d." key, device->index);     \
    }

#define DEVICE_NUMBER(call, type, key)                                               \
    nvmlReturn_t call(nvmlDevice_t device, type *out)                                \
    {                                                                                \
        u64 value[MAX_NUMBERS];                                                      \
        int count;                                                                   \
        ENTER();                                                                     \
        nvmlReturn_t code = numbers(value, &count, "gpu.%d." key, device->index);    \
        if (code == SUCCESS)                                                         \
            *out = (type)value[0];                                                   \
        return code;                                                                 \
    }

#define DEVICE_PAIR(call, type, key)                                                 \
    nvmlReturn_t call(nvmlDevice_t device, type *first, type *second)                \
    {                                                                                \
        u64 value[MAX_NUMBERS];                                                      \
        int count;                                                                   \
        ENTER();                                                                     \
        nvmlReturn_t code = numbers(value, &count, "gpu.%d." key, device->index);    \
        if (code == SUCCESS) {                                                       \
            *first = (type)value[0];                                                 \
            *second = (type)value[1];                                                \
        }                                                                            \
        return code;                                                                 \
    }

DEVICE_TEXT(nvmlDeviceGetName, "name")
DEVICE_TEXT(nvmlDeviceGetUUID, "uuid")
DEVICE_PAIR(nvmlDeviceGetCudaComputeCapability, int, "compute_capability")
DEVICE_PAIR(nvmlDeviceGetMigMode, unsigned, "mig_mode")
DEVICE_PAIR(nvmlDeviceGetEccMode, unsigned, "ecc_mode")
DEVICE_NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, "pcie_generation")
DEVICE_NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, "pcie_generation_max")
DEVICE_NUMBER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, "pcie_width")
DEVICE_NUMBER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, "pcie_width_max")
DEVICE_NUMBER(nvmlDeviceGetEnforcedPowerLimit, unsigned, "enforced_power_limit_mw")
DEVICE_NUMBER(nvmlDeviceGetCurrentClocksEventReasons, u64, "clocks_event_reasons")
DEVICE_NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, u64, "clocks_throttle_reasons")

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    nvmlReturn_t code = numbers(value, &count, "gpu.%d.memory", device->index);
    if (code == SUCCESS)
        *out = (nvmlMemory_t){.total = value[0], .free = value[1], .used = value[2]};
    return code;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    if (out->version != MEMORY_V2)
        return ARGUMENT_VERSION_MISMATCH;
    nvmlReturn_t code = numbers(value, &count, "gpu.%d.memory_v2", device->index);
    if (code != SUCCESS)
        return code;
    out->total = value[0];
    out->reserved = value[1];
    out->free = value[2];
    out->used = value[3];
    return SUCCESS;
}

/* Number `place` of the list under "gpu.I.key"; a list that is too short is an invalid argument. */
static nvmlReturn_t listed(nvmlDevice_t device, const char *key, unsigned place, unsigned *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    nvmlReturn_t code = numbers(value, &count, "gpu.%d.%s", device->index, key);
    if (code != SUCCESS)
        return code;
    if (place >= (unsigned)count)
        return INVALID_ARGUMENT;
    *out = (unsigned)value[place];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned link, unsigned *out)
{
    ENTER();
    return listed(device, "nvlinks", link, out);
}

nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, unsigned link, unsigned *out)
{
    ENTER();
    return listed(device, "nvlink_remote_types", link, out);
}

static nvmlReturn_t bus_of(int index, nvmlPciInfo_t *out)
{
    memset(out, 0, sizeof *out);
    return text(out->busId, sizeof out->busId, "gpu.%d.bus_id", index);
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *out)
{
    ENTER();
    return bus_of(device->index, out);
}

/* "nvlink_remote_gpus" holds the index of the GPU at the other end of each link. */
nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned link, nvmlPciInfo_t *out)
{
    unsigned remote;
    ENTER();
    nvmlReturn_t code = listed(device, "nvlink_remote_gpus", link, &remote);
    return code == SUCCESS ? bus_of((int)remote, out) : code;
}

/* "topology" and "p2p" hold one number per GPU: the level of the common ancestor, the status of both directions. */
nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t device, nvmlDevice_t peer, unsigned *out)
{
    ENTER();
    return listed(device, "topology", (unsigned)peer->index, out);
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t device, nvmlDevice_t peer, unsigned kind, unsigned *out)
{
    ENTER();
    if (kind > 1)
        return INVALID_ARGUMENT;
    return listed(device, kind ? "p2p_write" : "p2p_read", (unsigned)peer->index, out);
}

/* "processes" alternates pid and used bytes; 2^64 - 1 bytes is NVML_VALUE_NOT_AVAILABLE. */
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *size, nvmlProcessInfo_t *out)
{
    u64 value[MAX_NUMBERS];
    int count;
    ENTER();
    nvmlReturn_t code = numbers(value, &count, "gpu.%d.processes", device->index);
    if (code != SUCCESS)
        return code;
    unsigned room = *size;
    *size = (unsigned)count / 2;
    if (*size > room)
        return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < *size; i++)
        out[i] = (nvmlProcessInfo_t){
            .pid = (unsigned)value[2 * i],
            .usedGpuMemory = value[2 * i + 1],
            .gpuInstanceId = ~0u,
            .computeInstanceId = ~0u,
        };
    return SUCCESS;
}
