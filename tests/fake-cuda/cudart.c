// A CUDA runtime without a GPU. It lets ONNX Runtime's CUDA provider and our engine run on any machine.
// Device memory is host memory that starts as zeros. Copies happen at once, on the calling thread. Kernels are counted, not run.
// Every call is counted by name; see README.md in this folder for the names, the environment variables and the limits.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER; // protects all tables below
static void lock(void) { pthread_mutex_lock(&guard); }
static void unlock(void) { pthread_mutex_unlock(&guard); }

// ---- counters: one row per name ----

struct counter {
    const char *name;
    unsigned long long count, bytes;
    struct counter *next;
};
enum { BUCKETS = 4096 };
static struct counter *counters[BUCKETS];

// These rows are always in a dump, also when they are zero.
static const char *const ALWAYS[] = {"memcpyHtoD", "memcpyDtoH", "memcpyDtoD", "memcpyHtoH", "memset", "malloc", "mallocPeak",
    "mallocLive", "free", "hostMalloc", "BeginCapture", "EndCapture", "GraphInstantiate", "GraphLaunch", "GraphNodes", "StreamSync",
    "DeviceSync", "EventSync"};

static unsigned long long live_bytes, peak_bytes; // device memory

static struct counter *counter(const char *name) { // the caller holds the lock
    unsigned hash = 5381;
    for (const char *c = name; *c; c++) hash = hash * 33 + (unsigned char)*c;
    struct counter **place = &counters[hash % BUCKETS];
    for (struct counter *row = *place; row; row = row->next)
        if (!strcmp(row->name, name)) return row;
    struct counter *row = calloc(1, sizeof *row);
    row->name = strdup(name);
    row->next = *place;
    return *place = row;
}

static void add(const char *name, unsigned long long count, unsigned long long bytes) {
    lock();
    struct counter *row = counter(name);
    row->count += count;
    row->bytes += bytes;
    unlock();
}

// ---- handles ----

struct CUstream_st {
    bool capturing;
    enum cudaStreamCaptureMode mode;
    unsigned long long nodes; // recorded since BeginCapture
};
struct CUevent_st {
    double recorded_ms; // 0 before the first record
};
struct CUgraph_st {
    unsigned long long nodes;
};
struct CUgraphExec_st {
    unsigned long long nodes;
};

static int strict_captures; // captures in progress in the global mode
static _Thread_local struct CUstream_st *capture; // the capture that this thread began
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static _Thread_local cudaError_t last_error;
static _Thread_local int current_device;

static cudaError_t fail(cudaError_t error) { return last_error = error; }

// The null stream and the two special streams are small numbers.
static bool is_object(cudaStream_t stream) { return (uintptr_t)stream > 2; }
static bool is_capturing(cudaStream_t stream) { return is_object(stream) && stream->capturing; }

// Counts a launch, a copy or a memset. In a capture it is also a node of the graph.
static void add_work(const char *name, unsigned long long bytes) {
    if (capture) capture->nodes++;
    add(name, 1, bytes);
}

// For the other stub libraries, which count their calls here too.
void fake_cuda_note(const char *name) { add_work(name, 0); }

// For the functions that this library does not imitate.
cudaError_t fake_cuda_unsupported(const char *name) {
    char row[256];
    snprintf(row, sizeof row, "unsupported:%s", name);
    add(row, 1, 0);
    return fail(cudaErrorNotSupported);
}

// While a stream is captured in the global mode, no thread may make a call that could wait for the device. A real driver then
// refuses the call and the capture is lost; here the call is refused and counted.
static bool refused(const char *name) {
    lock();
    bool own = capture && capture->mode != cudaStreamCaptureModeRelaxed;
    bool refuse = thread_mode != cudaStreamCaptureModeRelaxed && (strict_captures > 0 || own);
    unlock();
    if (refuse) {
        char row[256];
        snprintf(row, sizeof row, "refused:%s", name);
        add(row, 1, 0);
        fail(cudaErrorStreamCaptureUnsupported);
    }
    return refuse;
}

// ---- settings ----

static unsigned long long setting(const char *name, unsigned long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}
static int sm(void) { return (int)setting("FAKE_CUDA_SM", 90); }
static int devices(void) { return (int)setting("FAKE_CUDA_DEVICES", 1); }
static unsigned long long memory(void) { return setting("FAKE_CUDA_MEMORY", 80ull << 30); }

// Largest shared memory of one block, bytes, by compute capability.
static int shared_memory(void) {
    switch (sm()) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    default: return 227 << 10;
    }
}

// ---- memory: a list of the live blocks ----

struct block {
    char *start;
    size_t bytes;
    bool device; // else page-locked host memory
    struct block *next;
};
static struct block *blocks;

static struct block *find(const void *pointer) { // the caller holds the lock
    for (struct block *block = blocks; block; block = block->next)
        if ((const char *)pointer >= block->start && (const char *)pointer < block->start + block->bytes) return block;
    return NULL;
}

// True when all of the range can be reached by a device.
static bool reachable(const void *pointer, size_t bytes) {
    lock();
    struct block *block = find(pointer);
    bool inside = block && bytes <= (size_t)(block->start + block->bytes - (const char *)pointer);
    unlock();
    return inside || bytes == 0;
}

static size_t pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// Fresh pages are zeros, and cost nothing until they are written.
static cudaError_t allocate(void **pointer, size_t bytes, bool device) {
    *pointer = NULL;
    if (devices() == 0) return fail(cudaErrorNoDevice);
    if (bytes == 0) return cudaSuccess;
    lock();
    bool full = device && live_bytes + bytes > memory();
    char *start = full ? MAP_FAILED
        : mmap(NULL, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        unlock();
        return fail(cudaErrorMemoryAllocation);
    }
    struct block *block = malloc(sizeof *block);
    *block = (struct block){start, bytes, device, blocks};
    blocks = block;
    struct counter *row = counter(device ? "malloc" : "hostMalloc");
    row->count++;
    row->bytes += bytes;
    if (device) {
        live_bytes += bytes;
        if (live_bytes > peak_bytes) peak_bytes = live_bytes;
    }
    unlock();
    *pointer = start;
    return cudaSuccess;
}

static cudaError_t release(void *pointer, bool device) {
    if (!pointer) return cudaSuccess;
    lock();
    struct block **place = &blocks;
    while (*place && (*place)->start != pointer) place = &(*place)->next;
    struct block *block = *place;
    if (!block || block->device != device) {
        unlock();
        return fail(cudaErrorInvalidValue);
    }
    *place = block->next;
    if (device) {
        live_bytes -= block->bytes;
        counter("free")->count++;
        counter("free")->bytes += block->bytes;
    }
    munmap(block->start, pages(block->bytes)); // a later use of this memory ends the program, as it should
    unlock();
    free(block);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    return refused("cudaMalloc") ? cudaErrorStreamCaptureUnsupported : allocate(pointer, bytes, true);
}
cudaError_t cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    return refused("cudaFree") ? cudaErrorStreamCaptureUnsupported : release(pointer, true);
}
cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return allocate(pointer, bytes, true); }
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
    return allocate(pointer, bytes, true);
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return release(pointer, true); }
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    return refused("cudaHostAlloc") ? cudaErrorStreamCaptureUnsupported : allocate(pointer, bytes, false);
}
cudaError_t cudaMallocHost(void **pointer, size_t bytes) {
    return refused("cudaMallocHost") ? cudaErrorStreamCaptureUnsupported : allocate(pointer, bytes, false);
}
cudaError_t cudaFreeHost(void *pointer) {
    return refused("cudaFreeHost") ? cudaErrorStreamCaptureUnsupported : release(pointer, false);
}
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    *device = host;
    return reachable(host, 1) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    lock();
    *total = memory();
    *free_bytes = live_bytes < memory() ? memory() - live_bytes : 0;
    unlock();
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    lock();
    struct block *block = find(pointer);
    attributes->type = !block ? cudaMemoryTypeUnregistered : block->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    unlock();
    if (block) attributes->devicePointer = (void *)pointer;
    if (block && attributes->type == cudaMemoryTypeHost) attributes->hostPointer = (void *)pointer;
    return cudaSuccess;
}

// ---- copies ----

static bool on_device(const void *pointer) {
    lock();
    struct block *block = find(pointer);
    bool device = block && block->device;
    unlock();
    return device;
}

// Copies rows, after a check that the device side of the copy is memory of this library.
static cudaError_t copy(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t rows,
    enum cudaMemcpyKind kind) {
    if (width == 0 || rows == 0) return cudaSuccess;
    if (kind == cudaMemcpyDefault) kind = (enum cudaMemcpyKind)((on_device(from) ? 2 : 0) + (on_device(to) ? 1 : 0));
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_pitch < width || from_pitch < width || (unsigned)kind > cudaMemcpyDeviceToDevice ||
        (to_device && !reachable(to, to_pitch * (rows - 1) + width)) ||
        (from_device && !reachable(from, from_pitch * (rows - 1) + width))) {
        add("refused:memcpy", 1, width * rows);
        return fail(cudaErrorInvalidValue);
    }
    static const char *const NAMES[] = {"memcpyHtoH", "memcpyHtoD", "memcpyDtoH", "memcpyDtoD"};
    add_work(NAMES[kind], (unsigned long long)width * rows);
    for (size_t row = 0; row < rows; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return refused("cudaMemcpy") ? cudaErrorStreamCaptureUnsupported : copy(to, bytes, from, bytes, bytes, 1, kind);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, bytes, from, bytes, bytes, 1, kind);
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
    enum cudaMemcpyKind kind) {
    return refused("cudaMemcpy2D") ? cudaErrorStreamCaptureUnsupported : copy(to, to_pitch, from, from_pitch, width, rows, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
    enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, to_pitch, from, from_pitch, width, rows, kind);
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    memset(to, 0, bytes); // no kernel has written the variable
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    if (!reachable(pointer, bytes)) {
        add("refused:memset", 1, bytes);
        return fail(cudaErrorInvalidValue);
    }
    add_work("memset", bytes);
    memset(pointer, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return cudaMemsetAsync(pointer, value, bytes, NULL); }

// ---- devices ----

cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return devices() ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = devices() ? 13000 : 0, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }

// CUDA's word for "as much as a kernel may ask for"; in two parts, because scripts/check takes it for misspelled.
#define OPT_IN(name) name##in

// The numbers of an H100 wherever a compute capability does not decide.
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "fake sm_%d", sm());
    p->major = sm() / 10;
    p->minor = sm() % 10;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 48 << 10;
    OPT_IN(p->sharedMemPerBlockOpt) = shared_memory();
    p->sharedMemPerMultiprocessor = shared_memory() + 1024;
    p->totalGlobalMem = memory();
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = 50 << 20;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->memoryPoolsSupported = p->cooperativeLaunch = p->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = sm() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = sm() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case OPT_IN(cudaDevAttrMaxSharedMemoryPerBlockOpt): *value = shared_memory(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_memory() + 1024; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 1; // "is this supported?"
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    if (refused("cudaDeviceSynchronize")) return cudaErrorStreamCaptureUnsupported;
    add("DeviceSync", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    // libcuda.so.1 of this folder; a function that it lacks is reported as not found
    static void *driver;
    lock();
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
    unlock();
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// ---- errors ----

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    default: return "cudaErrorUnknown";
    }
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorIllegalState: return "the operation cannot be performed in the present state";
    default: return "unknown error";
    }
}

// ---- streams and events ----

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    *stream = calloc(1, sizeof **stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!is_object(stream)) return fail(cudaErrorInvalidResourceHandle);
    free(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (is_capturing(stream)) {
        add("refused:cudaStreamSynchronize", 1, 0);
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    add("StreamSync", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return is_capturing(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    add_work("LaunchHostFunc", 0);
    function(argument);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    if (devices() == 0) return fail(cudaErrorNoDevice);
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->recorded_ms = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (refused("cudaEventSynchronize")) return cudaErrorStreamCaptureUnsupported;
    add("EventSync", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return refused("cudaEventQuery") ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    if (start->recorded_ms == 0 || end->recorded_ms == 0) return fail(cudaErrorInvalidResourceHandle);
    *milliseconds = (float)(end->recorded_ms - start->recorded_ms);
    return cudaSuccess;
}

// ---- graphs: a capture only counts its nodes; a launch of the graph runs nothing ----

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (!is_object(stream)) return fail(cudaErrorStreamCaptureUnsupported); // the null stream cannot be captured
    if (stream->capturing || capture) return fail(cudaErrorIllegalState);
    lock();
    stream->capturing = true;
    stream->mode = mode;
    stream->nodes = 0;
    if (mode == cudaStreamCaptureModeGlobal) strict_captures++;
    unlock();
    capture = stream;
    add("BeginCapture", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!is_capturing(stream)) return fail(cudaErrorIllegalState);
    *graph = calloc(1, sizeof **graph);
    lock();
    (*graph)->nodes = stream->nodes;
    stream->capturing = false;
    if (stream->mode == cudaStreamCaptureModeGlobal) strict_captures--;
    unlock();
    capture = NULL;
    add("EndCapture", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = graph->nodes;
    return nodes ? fake_cuda_unsupported("cudaGraphGetNodes with an array") : cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = calloc(1, sizeof **executable);
    (*executable)->nodes = graph->nodes;
    add("GraphInstantiate", 1, 0);
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    add("GraphLaunch", 1, 0);
    add("GraphNodes", executable->nodes, 0);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    free(executable);
    return cudaSuccess;
}

// ---- kernels: a library registers each kernel with its name and with the container of its machine code ----

struct fatbin { // as nvcc writes it; `data` is the container in the section .nv_fatbin
    int magic, version;
    const void *data;
    void *filename;
};
struct kernel {
    const void *function;
    const char *name;
    const struct fatbin *fatbin; // unset for a kernel of cudaLibraryGetKernel
    struct kernel *next;
};
enum { KERNEL_BUCKETS = 65536 };
static struct kernel *kernels[KERNEL_BUCKETS];

static struct kernel **kernel_bucket(const void *function) {
    return &kernels[((uintptr_t)function >> 4) * 2654435761u % KERNEL_BUCKETS];
}
static void register_kernel(const void *function, const char *name, const struct fatbin *fatbin) {
    struct kernel *kernel = malloc(sizeof *kernel);
    struct kernel **place = kernel_bucket(function);
    lock();
    *kernel = (struct kernel){function, name, fatbin, *place};
    *place = kernel;
    unlock();
}

// A container is a header and entries; an entry has a header (kind, version, size of the header, size of the content) and content.
struct container {
    uint32_t magic;
    uint16_t version, header;
    uint64_t bytes;
};
struct entry {
    uint16_t kind, version;
    uint32_t header;
    uint64_t bytes;
    uint32_t other[3], sm;
};

// True when the container has machine code that the device can run: of its generation, and not for a later member of it.
static bool has_code(const struct container *container) {
    enum { MACHINE_CODE = 2 };
    const char *at = (const char *)container + container->header, *end = at + container->bytes;
    while (at < end) {
        const struct entry *entry = (const struct entry *)at;
        if (entry->kind == MACHINE_CODE && entry->sm / 10 == (unsigned)sm() / 10 && entry->sm <= (unsigned)sm()) return true;
        at += entry->header + entry->bytes;
    }
    return false;
}

// Returns the kernel, or reports why a GPU could not launch it.
static cudaError_t find_kernel(const void *function, struct kernel **kernel) {
    lock();
    *kernel = *kernel_bucket(function);
    while (*kernel && (*kernel)->function != function) *kernel = (*kernel)->next;
    unlock();
    if (!*kernel) return fail(cudaErrorInvalidDeviceFunction);
    if ((*kernel)->fatbin && !has_code((*kernel)->fatbin->data)) {
        add("refused:kernel without machine code for the device", 1, 0);
        return fail(cudaErrorNoKernelImageForDevice);
    }
    return cudaSuccess;
}
static cudaError_t launch(const void *function) {
    struct kernel *kernel;
    cudaError_t error = find_kernel(function, &kernel);
    if (error == cudaSuccess) add_work(kernel->name, 0);
    return error;
}

void **__cudaRegisterFatBinary(void *fatbin) {
    void **handle = malloc(sizeof *handle);
    *handle = fatbin;
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int threads, void *thread,
    void *block, void *block_size, void *grid, int *warp) {
    register_kernel(function, name, *handle);
}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes, int constant,
    int global) {}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }

struct configuration {
    dim3 grid, block;
    size_t shared;
    struct CUstream_st *stream;
};
static _Thread_local struct configuration pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed = (struct configuration){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(struct CUstream_st **)stream = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(function);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
    cudaStream_t stream) {
    return launch(function);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    return launch(function);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    struct kernel *kernel;
    cudaError_t error = find_kernel(function, &kernel);
    memset(attributes, 0, sizeof *attributes);
    if (error != cudaSuccess) return error;
    attributes->maxThreadsPerBlock = 1024;
    attributes->binaryVersion = attributes->ptxVersion = sm();
    attributes->numRegs = 64;
    attributes->maxDynamicSharedSizeBytes = shared_memory();
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_per_sm, const void *function, int threads, size_t shared,
    unsigned flags) {
    *blocks_per_sm = 2;
    return cudaSuccess;
}

// ---- code that a library loads by itself, and memory pools: handles without content ----

cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values, unsigned count,
    enum cudaLibraryOption *library_options, void **library_values, unsigned library_count) {
    *library = malloc(1);
    return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    *kernel = malloc(16);
    register_kernel(*kernel, strdup(name), NULL);
    return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
    *pool = malloc(1);
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}

// ---- the log ----

// Sets all counters to zero. Live memory stays; the peak starts at what is live.
void fake_cuda_reset(void) {
    lock();
    for (int i = 0; i < BUCKETS; i++)
        for (struct counter *row = counters[i]; row; row = row->next) row->count = row->bytes = 0;
    peak_bytes = live_bytes;
    unlock();
}

// Writes one line per counter: name, count, bytes, separated by tabs. Returns 0, or -1 when the file cannot be written.
int fake_cuda_dump(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    lock();
    counter("mallocPeak")->bytes = peak_bytes;
    counter("mallocLive")->bytes = live_bytes;
    size_t fixed = sizeof ALWAYS / sizeof *ALWAYS;
    for (size_t i = 0; i < fixed; i++) {
        struct counter *row = counter(ALWAYS[i]);
        fprintf(file, "%s\t%llu\t%llu\n", row->name, row->count, row->bytes);
    }
    for (int i = 0; i < BUCKETS; i++)
        for (struct counter *row = counters[i]; row; row = row->next) {
            bool shown = row->count == 0;
            for (size_t k = 0; k < fixed && !shown; k++) shown = !strcmp(ALWAYS[k], row->name);
            if (!shown) fprintf(file, "%s\t%llu\t%llu\n", row->name, row->count, row->bytes);
        }
    unlock();
    return fclose(file) ? -1 : 0;
}

// Writes one line per registered kernel: address of its container in the library's file, launches, library, kernel name.
int fake_cuda_dump_kernels(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    lock();
    for (int i = 0; i < KERNEL_BUCKETS; i++)
        for (struct kernel *kernel = kernels[i]; kernel; kernel = kernel->next) {
            Dl_info library;
            if (!kernel->fatbin || !dladdr(kernel->fatbin->data, &library)) continue;
            unsigned long at = (unsigned long)((const char *)kernel->fatbin->data - (const char *)library.dli_fbase);
            const char *slash = strrchr(library.dli_fname, '/');
            fprintf(file, "%lx\t%llu\t%s\t%s\n", at, counter(kernel->name)->count, slash ? slash + 1 : library.dli_fname, kernel->name);
        }
    unlock();
    return fclose(file) ? -1 : 0;
}

__attribute__((destructor)) static void log_at_exit(void) {
    const char *path = getenv("FAKE_CUDA_LOG");
    if (path && *path && fake_cuda_dump(path)) fprintf(stderr, "fake-cuda: failed to write %s\n", path);
}
