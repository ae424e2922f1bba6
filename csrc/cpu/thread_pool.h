// Threads that share the units of one job; see thread_pool.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biper {

// Units [0, units) of work; any thread may take any unit, in any order.
struct Job {
  void (*run)(const void* context, int64_t unit, void* scratch);
  const void* context;
  int64_t units;
  size_t scratch_bytes;  // private memory of a thread, 64-byte aligned, contents undefined
};

// Runs every unit on the calling thread and up to threads - 1 others; returns when all are done.
// Where the others are busy with a job of another caller, the calling thread works alone.
// Throws std::bad_alloc where the calling thread gets no scratch.
void run_job(const Job& job, int64_t threads);

// The entry of an OpenMP runtime that starts a parallel region, as GCC calls it.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// From now on takes the threads of that runtime, null: those of our own pool. Two pools in one
// process fight for its cores: threads of OpenMP spin for milliseconds after a region.
void share_threads(ParallelRegion region);

// Whether jobs run on the threads of an OpenMP runtime now; not in a process that has forked, whose
// runtime has lost its threads.
bool shares_threads();

// Processors that the calling thread may use: those that it may run on, but no more than the limit.
int64_t processors();

// From now on so many at most, but at least 1; at first there is no limit.
void limit_processors(int64_t most);

}  // namespace biper
