// The result is the median of bursts between two events. A GPU raises its clock when it has work,
// so bursts grow until one is long enough, and only those after it count.
#include "peak.h"

#ifndef __CUDACC__

namespace biper {

const char* measure_peak(int, int, double*) { return "only a GPU has this peak"; }

}  // namespace biper

#else

#include <algorithm>

#include "peak.cuh"

namespace biper {
namespace {

constexpr int kBursts = 5;
constexpr int kGraphNodes = 512;
constexpr uint32_t kSeed = 12345;

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A stream and two events, destroyed at the end of the scope.
class Stopwatch {
 public:
  Stopwatch() {
    error_ = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    for (cudaEvent_t& event : events_) {
      if (error_ == cudaSuccess) error_ = cudaEventCreate(&event);
    }
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    for (cudaEvent_t event : events_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  cudaStream_t stream() const { return stream_; }
  const char* error() const { return text_of(error_); }

  // The time of the work that `start` puts on the stream, in seconds, or an error's text.
  template <class Start>
  const char* time(const Start& start, double* seconds) {
    const char* problem = text_of(cudaEventRecord(events_[0], stream_));
    if (problem == nullptr) problem = start(stream_);
    if (problem == nullptr) problem = text_of(cudaEventRecord(events_[1], stream_));
    if (problem == nullptr) problem = text_of(cudaEventSynchronize(events_[1]));
    float milliseconds = 0;
    if (problem == nullptr) {
      problem = text_of(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]));
    }
    *seconds = 1e-3 * double(milliseconds);
    return problem;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t events_[2] = {nullptr, nullptr};
  cudaError_t error_ = cudaSuccess;
};

// Turns per second of the work that `burst(turns)` starts; the median of kBursts.
template <class Burst>
const char* turns_per_second(int milliseconds, const Burst& burst, double* rate) {
  Stopwatch watch;
  if (watch.error() != nullptr) return watch.error();
  const auto run = [&](int turns, double* seconds) {
    return watch.time([&](cudaStream_t stream) { return burst(turns, stream); }, seconds);
  };
  int turns = 1;
  double seconds = 0;
  for (;;) {
    const char* problem = run(turns, &seconds);
    if (problem != nullptr) return problem;
    if (seconds > 1e-3 * milliseconds || turns > (1 << 28)) break;
    turns *= 2;
  }
  double taken[kBursts];
  for (double& each : taken) {
    const char* problem = run(turns, &each);
    if (problem != nullptr) return problem;
  }
  std::sort(taken, taken + kBursts);
  *rate = turns / taken[kBursts / 2];
  return nullptr;
}

struct Device {
  int multiprocessors = 0;
  int capability = 0;  // 90 for 9.0
};

const char* current_device(Device* found) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](cudaDeviceAttr attribute, int* value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(cudaDevAttrMultiProcessorCount, &found->multiprocessors);
  get(cudaDevAttrComputeCapabilityMajor, &major);
  get(cudaDevAttrComputeCapabilityMinor, &minor);
  found->capability = 10 * major + minor;
  return text_of(error);
}

const char* rate_of(void (*kernel)(PeakParams), double macs, const Device& device, int milliseconds,
                    double* rate) {
  const unsigned blocks = kPeakBlocksPerSm * unsigned(device.multiprocessors);
  const auto burst = [&](int turns, cudaStream_t stream) {
    return launch(kernel, dim3(blocks), kPeakThreads, 0, stream, PeakParams{turns, kSeed, nullptr});
  };
  double turns = 0;
  const char* problem = turns_per_second(milliseconds, burst, &turns);
  const double warps = double(blocks) * (kPeakThreads / 32);
  *rate = turns * warps * kPeakInstructions * macs;
  return problem;
}

// An executable graph of kGraphNodes empty kernels in a row.
const char* graph_of_nothing(cudaGraphExec_t* executable) {
  Stopwatch owner;  // owns the stream that is captured
  if (owner.error() != nullptr) return owner.error();
  const cudaStream_t stream = owner.stream();
  cudaGraph_t graph = nullptr;
  const char* problem = text_of(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  if (problem != nullptr) return problem;
  for (int node = 0; node < kGraphNodes && problem == nullptr; ++node) {
    problem = launch(peak_nothing, dim3(1), 32, 0, stream, PeakParams{});
  }
  const char* at_end = text_of(cudaStreamEndCapture(stream, &graph));
  if (problem == nullptr) problem = at_end;
  if (problem == nullptr) problem = text_of(cudaGraphInstantiateWithFlags(executable, graph, 0));
  if (graph != nullptr) cudaGraphDestroy(graph);
  return problem;
}

const char* launches_per_second(int milliseconds, double* rate) {
  cudaGraphExec_t executable = nullptr;
  const char* problem = graph_of_nothing(&executable);
  if (problem != nullptr) return problem;
  const auto burst = [&](int turns, cudaStream_t stream) -> const char* {
    for (int turn = 0; turn < turns; ++turn) {
      const char* refused = text_of(cudaGraphLaunch(executable, stream));
      if (refused != nullptr) return refused;
    }
    return nullptr;
  };
  problem = turns_per_second(milliseconds, burst, rate);
  *rate *= kGraphNodes;
  cudaGraphExecDestroy(executable);
  return problem;
}

}  // namespace

const char* measure_peak(int kind, int milliseconds, double* operations_per_second) {
  *operations_per_second = 0;
  if (milliseconds < 1 || milliseconds > 1000) return "`milliseconds` must be from 1 to 1000";
  Device device;
  const char* problem = current_device(&device);
  if (problem != nullptr) return problem;
  // On other devices the kernels trap, which would end all other work on the device, too.
  if (kind == kPeakBinary && (device.capability < 80 || device.capability >= 100)) {
    return "only compute capability 8.0 to 9.x has 1-bit matrix instructions";
  }
  if ((kind == kPeakInt8 || kind == kPeakHalf) && device.capability < 80) {
    return "these matrix instructions need compute capability 8.0";
  }
  switch (kind) {
    case kPeakBinary:
      return rate_of(peak_binary, kBinaryMacs, device, milliseconds, operations_per_second);
    case kPeakPopcount:
      return rate_of(peak_popcount, kPopcountMacs, device, milliseconds, operations_per_second);
    case kPeakInt8:
      return rate_of(peak_int8, kInt8Macs, device, milliseconds, operations_per_second);
    case kPeakHalf:
      return rate_of(peak_half, kHalfMacs, device, milliseconds, operations_per_second);
    case kPeakLaunches:
      return launches_per_second(milliseconds, operations_per_second);
    default:
      return "`kind` must be one of biper::PeakKind";
  }
}

}  // namespace biper

#endif
