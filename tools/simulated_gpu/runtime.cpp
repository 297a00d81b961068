// A CUDA runtime and driver in software, for PyTorch on a machine without a GPU.
//
// Device memory is memory of the host. A stream is a queue whose operations run as late as the rules of CUDA allow:
// when somebody waits for them. So a program that reads a result, or overwrites what a copy still has to read, without
// waiting as it should, goes wrong here every time, and not once in a while as on a GPU. A graph is the list of the
// operations that were captured. What is forbidden during a capture fails as on a GPU. Kernels of PyTorch and of
// Triton do not run here: operations.py and kernels.py enqueue functions of the host in their place.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

struct Operation {
  std::function<void()> run;
  std::string name;  // of a kernel or copy, empty for what the device does not work on
};

struct Graph {
  std::vector<Operation> operations;
};

struct Capture {
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();  // null when the capture has ended
  struct Stream* origin;
  std::map<struct Stream*, size_t> unjoined;  // streams that the origin must wait for, and where in the graph they end
  std::thread::id thread;
  cudaStreamCaptureMode mode;
  unsigned long long id;
  bool broken = false;
};

struct Stream {
  int device = 0;
  int priority = 0;
  std::deque<Operation> queue;
  unsigned long long issued = 0, done = 0;
  bool running = false;  // one of its operations
  std::shared_ptr<Capture> capture;
};

struct Event {
  Stream* stream = nullptr;  // where it was recorded last
  unsigned long long position = 0;  // in the stream, or in the graph of a capture
  std::shared_ptr<Capture> capture;
  std::shared_ptr<Clock::time_point> time = std::make_shared<Clock::time_point>();
};

struct Range {
  size_t size;
  int device;  // -1: pinned memory of the host
};

constexpr size_t kAlignment = 1 << 21, kGap = 4096, kArenaBytes = size_t(1) << 40;
constexpr int kMaxDevices = 8;

std::mutex mutex;
std::condition_variable changed;
std::atomic<cudaError_t> failure = cudaSuccess;  // of a kernel, told to the next call that may know
Stream legacy[kMaxDevices];
std::set<Stream*> streams;
std::map<uintptr_t, Range> ranges;  // by first address
std::map<const void*, std::string> names;  // of PyTorch's kernels
std::vector<std::shared_ptr<Capture>> captures;  // that go on
std::vector<std::string> log_of_kernels, log_of_launches;
bool is_logging = false;
size_t used_bytes[kMaxDevices];
unsigned long long captures_begun = 0;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

size_t number_of(const char* variable, size_t otherwise) {
  const char* text = getenv(variable);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

int devices() {
  static const int count = std::min(kMaxDevices, static_cast<int>(number_of("SIMULATED_GPUS", 1)));
  return count;
}

size_t memory_bytes() {
  static const size_t size = number_of("SIMULATED_GPU_BYTES", size_t(8) << 30);
  return size;
}

bool kernels_run() {
  static const bool is_set = number_of("SIMULATED_GPU_KERNELS", 1);
  return is_set;
}

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t told_failure() { return failed(failure.exchange(cudaSuccess)); }

Stream* stream_of(cudaStream_t handle) {
  // 0 and 1: the device's default stream. 2, one per thread, is not used by PyTorch.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return &legacy[current_device];
  return reinterpret_cast<Stream*>(handle);
}

// Whether a call that might wait for other work is forbidden to this thread by a capture, which it breaks.
bool is_forbidden() {
  bool found = false;
  for (auto& capture : captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    if (thread_mode == cudaStreamCaptureModeRelaxed) continue;
    if (thread_mode == cudaStreamCaptureModeThreadLocal && !own) continue;
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeThreadLocal && !own) continue;
    capture->broken = found = true;
  }
  return found;
}

#define RETURN_IF_FORBIDDEN()                                            \
  {                                                                      \
    Lock lock(mutex);                                                    \
    if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported); \
  }

// Run a stream's operations up to a position. The lock is held at first and afterwards, not meanwhile.
void drain(Lock& lock, Stream* stream, unsigned long long position) {
  while (stream->done < position) {
    if (stream->running) {
      changed.wait(lock);
      continue;
    }
    stream->running = true;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (!operation.name.empty() && is_logging) log_of_kernels.push_back(operation.name);
    lock.unlock();
    operation.run();
    operation = {};
    lock.lock();
    ++stream->done;
    stream->running = false;
    changed.notify_all();
  }
}

void drain_all(Lock& lock, int device) {
  drain(lock, &legacy[device], legacy[device].issued);
  const std::set<Stream*> all = streams;
  for (Stream* stream : all)
    if (stream->device == device && streams.count(stream)) drain(lock, stream, stream->issued);
}

// Put an operation into a stream, or into the graph that the stream captures.
cudaError_t enqueue(Stream* stream, std::function<void()> run, std::string name = {}) {
  Lock lock(mutex);
  if (stream->capture) {
    if (stream->capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
    stream->capture->graph->operations.push_back({std::move(run), std::move(name)});
    if (stream != stream->capture->origin) stream->capture->unjoined[stream] = stream->capture->graph->operations.size();
    return cudaSuccess;
  }
  if (is_logging && !name.empty()) log_of_launches.push_back(name);
  stream->queue.push_back({std::move(run), std::move(name)});
  ++stream->issued;
  return cudaSuccess;
}

const Range* range_of(const void* pointer, uintptr_t* begin = nullptr) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  auto next = ranges.upper_bound(address);
  if (next == ranges.begin()) return nullptr;
  --next;
  if (begin) *begin = next->first;
  return address < next->first + next->second.size ? &next->second : nullptr;
}

bool is_pageable(const void* pointer) {
  Lock lock(mutex);
  return !range_of(pointer);
}

cudaError_t copy(void* target, const void* source, size_t size, Stream* stream) {
  bool is_captured;
  {
    Lock lock(mutex);
    is_captured = bool(stream->capture);
  }
  if (!is_captured && is_pageable(source)) {  // CUDA has read such memory when the call returns
    auto bytes = std::make_shared<std::vector<char>>(size);
    memcpy(bytes->data(), source, size);
    return enqueue(stream, [=] { memcpy(target, bytes->data(), size); }, "Memcpy");
  }
  const cudaError_t error = enqueue(stream, [=] { memcpy(target, source, size); }, "Memcpy");
  if (!is_captured && is_pageable(target)) {  // CUDA has written it when the call returns
    Lock lock(mutex);
    drain(lock, stream, stream->issued);
  }
  return error;
}

// All memory of the devices, and pinned memory: one range of addresses, of which only what is used takes any.
char* arena() {
  static char* const begin = [] {
    void* place = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) abort();
    return static_cast<char*>(place);
  }();
  return begin;
}

void* allocate(size_t size, int device) {
  Lock lock(mutex);
  if (device >= 0 && used_bytes[device] + size > memory_bytes()) return nullptr;
  uintptr_t begin = reinterpret_cast<uintptr_t>(arena()) + kAlignment;
  for (auto& [first, range] : ranges) {  // the first gap that is large enough, with a page between buffers
    if (first < begin || first >= reinterpret_cast<uintptr_t>(arena()) + kArenaBytes) continue;
    if (first >= begin + size + kGap) break;
    begin = (first + range.size + kGap + kAlignment - 1) / kAlignment * kAlignment;
  }
  void* place = reinterpret_cast<void*>(begin);
  if (begin + size > reinterpret_cast<uintptr_t>(arena()) + kArenaBytes) return nullptr;
  if (device >= 0) {
    used_bytes[device] += size;
    if (kernels_run() && size <= size_t(64) << 20) memset(place, 0xFF, size);  // NaN
  }
  ranges[begin] = {size, device};
  return place;
}

void release(void* pointer) {
  auto found = ranges.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == ranges.end()) return;
  if (found->second.device >= 0) used_bytes[found->second.device] -= found->second.size;
  madvise(pointer, (found->second.size + kGap - 1) / kGap * kGap, MADV_DONTNEED);
  ranges.erase(found);
}

cudaError_t not_simulated(const char* what) {
  static std::set<std::string> told;
  Lock lock(mutex);
  if (told.insert(what).second) fprintf(stderr, "simulated GPU: %s is not simulated\n", what);
  return failed(cudaErrorNotSupported);
}

}  // namespace

extern "C" {

// --- For Python ---------------------------------------------------------------------------------------------------

// Enqueue a function of the host that stands for a kernel, and returns whether it failed.
int simulated_kernel(void* stream, const char* name, int (*function)(void*), void* argument) {
  if (const cudaError_t error = told_failure()) return error;
  auto run = [=] {
    if (function(argument)) failure = cudaErrorLaunchFailure;
  };
  return enqueue(stream_of(static_cast<cudaStream_t>(stream)), run, name);
}

// Begin to note the kernels that are launched, and those that run.
void simulated_log_begin() {
  Lock lock(mutex);
  log_of_kernels.clear();
  log_of_launches.clear();
  is_logging = true;
}

// Return what was noted, a line each: "launch NAME", "run NAME". The caller frees the text.
char* simulated_log_end() {
  Lock lock(mutex);
  is_logging = false;
  std::string text;
  for (auto& name : log_of_launches) text += "launch " + name + "\n";
  for (auto& name : log_of_kernels) text += "run " + name + "\n";
  return strdup(text.c_str());
}

void simulated_free(char* text) { free(text); }

// Return where the range of addresses begins in which all memory of devices lies, and pinned memory.
void* simulated_arena(size_t* size) {
  *size = kArenaBytes;
  return arena();
}

// Return how many bytes from this address on belong to one buffer; 0 if none.
size_t simulated_bytes_at(const void* pointer) {
  Lock lock(mutex);
  uintptr_t begin;
  const Range* range = range_of(pointer, &begin);
  return range ? begin + range->size - reinterpret_cast<uintptr_t>(pointer) : 0;
}

int simulated_is_capturing(void* stream) {
  Lock lock(mutex);
  return bool(stream_of(static_cast<cudaStream_t>(stream))->capture);
}

// --- Devices ------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  if (device < 0 || device >= devices()) return failed(cudaErrorInvalidDevice);
  cudaDeviceProp p;
  memset(&p, 0, sizeof p);
  snprintf(p.name, sizeof p.name, "Simulated GPU");
  p.totalGlobalMem = memory_bytes();
  p.major = static_cast<int>(number_of("SIMULATED_GPU_MAJOR", 9));
  p.minor = 0;
  p.multiProcessorCount = 4;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 49152;
  p.sharedMemPerBlockOptin = 232448;
  p.sharedMemPerMultiprocessor = 233472;
  p.l2CacheSize = 50 << 20;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.unifiedAddressing = p.managedMemory = p.concurrentKernels = p.cooperativeLaunch = 1;
  p.pciBusID = device + 1;
  p.memoryBusWidth = 5120;
  p.textureAlignment = 512;
  *found = p;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, device) != cudaSuccess) return last_error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(p.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(p.sharedMemPerBlock); break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  RETURN_IF_FORBIDDEN();
  Lock lock(mutex);
  drain_all(lock, current_device);
  return told_failure();
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Lock lock(mutex);
  *total = memory_bytes();
  *free_bytes = memory_bytes() - used_bytes[current_device];
  return cudaSuccess;
}

// --- Errors -------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    default: return "another CUDA error";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotSupported: return "the simulated GPU does not have this operation";
    case cudaErrorLaunchFailure: return "a kernel of the simulated GPU failed";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return cudaGetErrorName(error);
  }
}

// --- Memory -------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t size) {
  RETURN_IF_FORBIDDEN();
  *pointer = allocate(size, current_device);
  return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  RETURN_IF_FORBIDDEN();
  Lock lock(mutex);
  const Range* range = range_of(pointer);
  drain_all(lock, range && range->device >= 0 ? range->device : current_device);
  release(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  RETURN_IF_FORBIDDEN();
  *pointer = allocate(size, -1);
  return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void* pointer) {
  RETURN_IF_FORBIDDEN();
  Lock lock(mutex);
  for (int device = 0; device < devices(); ++device) drain_all(lock, device);
  release(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  Lock lock(mutex);
  ranges[reinterpret_cast<uintptr_t>(pointer)] = {size, -1};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock(mutex);
  ranges.erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  Lock lock(mutex);
  memset(found, 0, sizeof *found);
  const Range* range = range_of(pointer);
  found->type = !range ? cudaMemoryTypeUnregistered : range->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  found->device = range && range->device >= 0 ? range->device : 0;
  if (range) {
    found->hostPointer = range->device < 0 ? const_cast<void*>(pointer) : nullptr;
    found->devicePointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(target, source, size, stream_of(stream));
}

cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  return copy(target, source, size, stream_of(stream));
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t error = copy(static_cast<char*>(target) + row * target_pitch,
                                   static_cast<const char*>(source) + row * source_pitch, width, stream_of(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
  RETURN_IF_FORBIDDEN();
  const cudaError_t error = cudaMemcpyAsync(target, source, size, kind, nullptr);
  Lock lock(mutex);
  drain(lock, stream_of(nullptr), stream_of(nullptr)->issued);
  return error;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  return enqueue(stream_of(stream), [=] { memset(target, value, size); }, "Memset");
}

cudaError_t cudaMemset(void* target, int value, size_t size) { return cudaMemsetAsync(target, value, size, nullptr); }

// --- Streams ------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  auto* created = new Stream;
  created->device = current_device;
  created->priority = priority;
  Lock lock(mutex);
  streams.insert(created);
  *stream = reinterpret_cast<cudaStream_t>(created);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  Lock lock(mutex);
  drain(lock, stream, stream->issued);
  streams.erase(stream);  // events may still name it: it stays allocated
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  RETURN_IF_FORBIDDEN();
  Stream* stream = stream_of(handle);
  Lock lock(mutex);
  if (stream->capture) {
    stream->capture->broken = true;
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  drain(lock, stream, stream->issued);
  return told_failure();
}

// Each question lets one operation run: a loop of questions ends.
static cudaError_t query(Stream* stream, unsigned long long position) {
  Lock lock(mutex);
  if (stream->done < position && !stream->running) drain(lock, stream, stream->done + 1);
  return stream->done < position ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  RETURN_IF_FORBIDDEN();
  return failed(query(stream_of(handle), stream_of(handle)->issued));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  return enqueue(stream_of(stream), [=] { function(argument); });
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* argument, unsigned) {
  return enqueue(stream_of(stream), [=] { function(stream, cudaSuccess, argument); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Stream* stream = stream_of(handle);
  Event* event = reinterpret_cast<Event*>(event_handle);
  Stream* other = event->stream;
  const auto position = event->position;
  if (!other) return cudaSuccess;  // never recorded
  {
    Lock lock(mutex);
    if (auto capture = event->capture) {
      if (!capture->graph) return failed(cudaErrorCapturedEvent);
      if (stream->capture && stream->capture != capture) return failed(cudaErrorStreamCaptureMerge);
      if (!streams.count(stream)) {  // a default stream
        capture->broken = true;
        return failed(cudaErrorStreamCaptureImplicit);
      }
      stream->capture = capture;  // this stream takes part in the capture from now on
      auto joined = capture->unjoined.find(other);  // if nothing was captured there after the event
      if (joined != capture->unjoined.end() && joined->second <= position) capture->unjoined.erase(joined);
      if (stream != capture->origin) capture->unjoined[stream] = capture->graph->operations.size();
      return cudaSuccess;
    }
    if (stream->capture) {  // waiting for work outside of the capture
      stream->capture->broken = true;
      return failed(cudaErrorStreamCaptureIsolation);
    }
    if (other == stream || other->done >= position) return cudaSuccess;
  }
  return enqueue(stream, [=] {
    Lock lock(mutex);
    drain(lock, other, position);
  });
}

// --- Events -------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  Event* event = reinterpret_cast<Event*>(handle);
  Stream* stream = stream_of(stream_handle);
  auto time = std::make_shared<Clock::time_point>();
  if (const cudaError_t error = enqueue(stream, [=] { *time = Clock::now(); })) return error;
  Lock lock(mutex);
  event->stream = stream;
  event->capture = stream->capture;
  event->position = event->capture ? event->capture->graph->operations.size() : stream->issued;
  event->time = time;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  RETURN_IF_FORBIDDEN();
  Event* event = reinterpret_cast<Event*>(handle);
  if (event->capture) return failed(cudaErrorCapturedEvent);
  return event->stream ? failed(query(event->stream, event->position)) : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  RETURN_IF_FORBIDDEN();
  Event* event = reinterpret_cast<Event*>(handle);
  if (event->capture) return failed(cudaErrorCapturedEvent);
  Lock lock(mutex);
  if (event->stream) drain(lock, event->stream, event->position);
  return told_failure();
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
  Event *begin = reinterpret_cast<Event*>(first), *end = reinterpret_cast<Event*>(second);
  *milliseconds = std::chrono::duration<float, std::milli>(*end->time - *begin->time).count();
  return cudaSuccess;
}

// --- Captures and graphs ------------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  Lock lock(mutex);
  if (stream->capture || stream == &legacy[current_device]) return failed(cudaErrorStreamCaptureUnsupported);
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->thread = std::this_thread::get_id();
  capture->mode = mode;
  capture->id = ++captures_begun;
  stream->capture = capture;
  captures.push_back(capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream* stream = stream_of(handle);
  Lock lock(mutex);
  *graph = nullptr;
  auto capture = stream->capture;
  if (!capture) return failed(cudaErrorIllegalState);
  if (capture->origin != stream) return failed(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return failed(cudaErrorStreamCaptureWrongThread);
  for (Stream* one : streams)
    if (one->capture == capture) one->capture = nullptr;
  for (size_t i = 0; i < captures.size(); ++i)
    if (captures[i] == capture) captures.erase(captures.begin() + i--);
  auto captured = std::move(capture->graph);
  if (capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
  if (!capture->unjoined.empty()) return failed(cudaErrorStreamCaptureUnjoined);
  *graph = reinterpret_cast<cudaGraph_t>(captured.release());
  return cudaSuccess;
}

static cudaStreamCaptureStatus status_of(const Stream* stream) {
  if (!stream->capture) return cudaStreamCaptureStatusNone;
  return stream->capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  *status = status_of(stream_of(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  *status = status_of(stream);
  if (id) *id = stream->capture ? stream->capture->id : 0;
  if (graph) *graph = stream->capture ? reinterpret_cast<cudaGraph_t>(stream->capture->graph.get()) : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  auto& operations = reinterpret_cast<Graph*>(graph)->operations;
  if (nodes)
    for (size_t i = 0; i < *count && i < operations.size(); ++i)
      nodes[i] = reinterpret_cast<cudaGraphNode_t>(&operations[i]);
  *count = operations.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new std::shared_ptr<Graph>(
      std::make_shared<Graph>(*reinterpret_cast<Graph*>(graph))));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  auto graph = *reinterpret_cast<std::shared_ptr<Graph>*>(executable);
  Stream* stream = stream_of(handle);
  {
    Lock lock(mutex);
    if (stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
    if (is_logging) log_of_launches.push_back("graph");
    for (auto& operation : graph->operations) stream->queue.push_back(operation);
    stream->issued += graph->operations.size();
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(executable);
  return cudaSuccess;
}

// --- Kernels of PyTorch, known by name alone ------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(mutex);
  names[host] = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3{1, 1, 1};
  *shared = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) {
  std::string name = "a kernel";
  {
    Lock lock(mutex);
    if (names.count(host)) name = names[host];
  }
  return not_simulated(name.c_str());
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->ptxVersion = found->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- The driver, as far as PyTorch asks it -----------------------------------------------------------------------------

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the simulated driver";
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(uintptr_t(current_device + 1));
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *static_cast<CUdeviceptr*>(value) = pointer;
  return CUDA_SUCCESS;
}

}  // extern "C"
