// One pool of threads for the process, where there is no other one to share.
//
// Units are taken from a counter, so that a thread that comes late or loses its core costs no more
// than the unit in its hands: the caller goes on alone, closes the job when no unit is left, and
// waits for those only that had joined it by then.
//
// A thread that has nothing to do looks for a job for kSpin, in which the next layer of a network
// usually comes, then sleeps. A process that forks has no pool threads in the child: the child
// starts with a new pool, and the old one is leaked with whatever its threads held.
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace biper {
namespace {

constexpr std::chrono::microseconds kSpin{50};
constexpr int kPausesPerLook = 32;
constexpr int64_t kMaxThreads = 1024;

void pause_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Memory of one thread, kept from job to job and as large as the largest one needed.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* get(size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (memory_ != nullptr) bytes_ = bytes;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.get(bytes > 0 ? bytes : 1);
}

std::atomic<ParallelRegion> parallel_region{nullptr};

void take_units(const Job& job, std::atomic<int64_t>& next, void* scratch) {
  for (;;) {
    const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
    if (unit >= job.units) return;
    job.run(job.context, unit, scratch);
  }
}

// Runs a job on the threads of an OpenMP runtime, the calling one among them.
void run_in_region(ParallelRegion region, const Job& job, int64_t threads) {
  struct Team {
    const Job* job;
    std::atomic<int64_t> next;
  } team{&job, {0}};
  const auto body = [](void* memory) {
    Team* t = static_cast<Team*>(memory);
    void* scratch = thread_scratch(t->job->scratch_bytes);
    if (scratch != nullptr) take_units(*t->job, t->next, scratch);
  };
  region(body, &team, static_cast<unsigned>(threads), 0);
}

class ThreadPool {
 public:
  // Whether the job ran: false where another one is running.
  bool try_run(const Job& job, int64_t threads, void* scratch) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    std::atomic<int64_t> next{0};
    open(job, next, threads - 1);
    take_units(job, next, scratch);
    close();
    return true;
  }

 private:
  void open(const Job& job, std::atomic<int64_t>& next, int64_t helpers) {
    bool sleeping;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = &job;
      next_ = &next;
      places_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
      sleeping = sleepers_ > 0;
    }
    if (sleeping) wake_.notify_all();
  }

  void close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
      next_ = nullptr;
    }
    for (int looks = 0; working_.load(std::memory_order_acquire) > 0; ++looks) {
      // A helper without a core can only go on if it gets this one.
      looks < 1000 ? pause_processor() : std::this_thread::yield();
    }
  }

  void grow(int64_t helpers) {
    while (threads_ < helpers && threads_ < kMaxThreads) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system gives no more threads; those that are there share the work
      }
      ++threads_;
    }
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      wait(seen);
      Job job;
      std::atomic<int64_t>* next;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = generation_.load(std::memory_order_relaxed);
        if (job_ == nullptr || places_ == 0) continue;
        --places_;
        job = *job_;
        next = next_;
        working_.fetch_add(1, std::memory_order_relaxed);
      }
      void* scratch = thread_scratch(job.scratch_bytes);
      if (scratch != nullptr) take_units(job, *next, scratch);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Returns once there was a job after generation `seen`.
  void wait(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < kPausesPerLook; ++i) {
        if (generation_.load(std::memory_order_acquire) != seen) return;
        pause_processor();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
    --sleepers_;
  }

  std::mutex busy_;   // held by the caller whose job runs
  std::mutex mutex_;  // guards everything below but the atomics
  std::condition_variable wake_;
  const Job* job_ = nullptr;
  std::atomic<int64_t>* next_ = nullptr;
  int64_t places_ = 0;  // helpers that may still join
  int64_t threads_ = 0;
  int64_t sleepers_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> working_{0};
};

std::atomic<ThreadPool*> the_pool{nullptr};

// Pools are never destroyed: their threads may still sleep in them when the process ends.
ThreadPool& pool() {
  ThreadPool* current = the_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  ThreadPool* made = new ThreadPool;
  if (the_pool.compare_exchange_strong(current, made)) return *made;
  delete made;  // another thread was faster, and nobody has seen this one
  return *current;
}

#if defined(__unix__) || defined(__APPLE__)
void forget_threads() {
  the_pool.store(nullptr, std::memory_order_release);
  parallel_region.store(nullptr, std::memory_order_release);
}
const int at_fork = pthread_atfork(nullptr, nullptr, forget_threads);
#endif

std::atomic<int64_t> most_processors{std::numeric_limits<int64_t>::max()};

// Processors that the calling thread may run on.
int64_t affinity() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int64_t>(count) : 1;
}

}  // namespace

void run_job(const Job& job, int64_t threads) {
  if (job.units <= 0) return;
  void* scratch = thread_scratch(job.scratch_bytes);
  if (scratch == nullptr) throw std::bad_alloc();
  if (threads > job.units) threads = job.units;
  if (threads > 1) {
    const ParallelRegion region = parallel_region.load(std::memory_order_acquire);
    if (region != nullptr) return run_in_region(region, job, threads);
    if (pool().try_run(job, threads, scratch)) return;
  }
  for (int64_t unit = 0; unit < job.units; ++unit) job.run(job.context, unit, scratch);
}

void share_threads(ParallelRegion region) {
  parallel_region.store(region, std::memory_order_release);
}

bool shares_threads() { return parallel_region.load(std::memory_order_acquire) != nullptr; }

int64_t processors() {
  return std::min(affinity(), most_processors.load(std::memory_order_relaxed));
}

void limit_processors(int64_t most) {
  most_processors.store(std::max<int64_t>(1, most), std::memory_order_relaxed);
}

}  // namespace biper
