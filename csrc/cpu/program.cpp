// How a program is checked, placed in memory and run by several threads.
//
// Threads run the steps side by side. The units of a step are cut into a range for each thread, the
// same part of the maps in every step, so that a thread finds in its core's cache what it wrote
// there; whoever is done with its own range takes what is left of the others', and where nothing is
// left waits until what others took is done. So a thread that comes late, or whose core is taken
// away while it holds no unit, keeps nobody waiting.
#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <thread>

#include "steps.h"

namespace biper {
namespace {

constexpr int64_t kAlignment = 64;
// A large batch runs part after part, so that maps of a layer are in the caches when the next one
// reads them: on a Zen 4, 64 images of 32x32 through a ResNet-20 in 4 instead of 6 ms.
constexpr int64_t kArenaBytes = int64_t{2} << 20;
// What is kept for later calls: the last one used, and others within these limits.
constexpr size_t kIdleBatches = 8;
constexpr int64_t kIdleBytes = int64_t{16} << 20;
constexpr int kPausesBeforeYield = 4000;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void pause_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Throws unless the values of a map can be counted.
void require_map(const MapShape& shape) {
  for (const int64_t size : {shape.height, shape.width, shape.channels}) {
    require_range("size of a map", size, 1, std::numeric_limits<int32_t>::max());
  }
  checked_product("The map", {shape.height, shape.width, shape.channels});
}

struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

double now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(time).count();
}

}  // namespace

struct Program::PreparedBatch {
  CallShape shape;
  std::vector<std::unique_ptr<PreparedStep>> steps;
  int64_t ranges = 1;                // of units, in every step
  std::unique_ptr<Counter[]> taken;  // [steps, ranges]
  std::unique_ptr<Counter[]> done;   // [steps]
  std::unique_ptr<char, void (*)(void*)> arena{nullptr, std::free};
  std::vector<void*> maps;
  size_t scratch_bytes = 0;
  double* seconds = nullptr;  // [steps] or null

  void reset();
  void run(int64_t thread, void* scratch) const;
  int64_t run_units(size_t step, int64_t thread, void* scratch) const;
};

void Program::PreparedBatch::reset() {
  const size_t counters = steps.size() * static_cast<size_t>(ranges);
  for (size_t c = 0; c < counters; ++c) taken[c].value.store(0, std::memory_order_relaxed);
  for (size_t s = 0; s < steps.size(); ++s) done[s].value.store(0, std::memory_order_relaxed);
}

// Takes units of a step until none is left, those of the thread's own range first; returns how many
// it ran.
int64_t Program::PreparedBatch::run_units(size_t step, int64_t thread, void* scratch) const {
  const Job& job = steps[step]->job;
  Counter* counters = taken.get() + step * static_cast<size_t>(ranges);
  int64_t mine = 0;
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t range = (thread + i) % ranges;
    const int64_t first = job.units * range / ranges;
    const int64_t units = job.units * (range + 1) / ranges - first;
    std::atomic<int64_t>& next = counters[range].value;
    while (next.load(std::memory_order_relaxed) < units) {
      const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units) break;
      job.run(job.context, first + unit, scratch);
      ++mine;
    }
  }
  return mine;
}

void Program::PreparedBatch::run(int64_t thread, void* scratch) const {
  for (size_t s = 0; s < steps.size(); ++s) {
    const int64_t units = steps[s]->job.units;
    const int64_t mine = run_units(s, thread, scratch);
    std::atomic<int64_t>& count = done[s].value;
    if (mine > 0 && count.fetch_add(mine, std::memory_order_acq_rel) + mine == units) {
      if (seconds != nullptr) seconds[s] = now();
      continue;
    }
    for (int looks = 0; count.load(std::memory_order_acquire) < units; ++looks) {
      looks < kPausesBeforeYield ? pause_processor() : std::this_thread::yield();
    }
  }
}

Program::Program() = default;
Program::~Program() = default;

int64_t Program::add_map(const MapShape& shape) {
  if (finished_) fail("The program is finished.");
  require_map(shape);
  const int64_t map = static_cast<int64_t>(maps_.size());
  maps_.push_back({shape, map});
  return map;
}

int64_t Program::add_view(int64_t map, const MapShape& shape) {
  require_map(shape);
  const MapShape& old = shape_of(map, shape.packed);
  if (old.values() != shape.values()) {
    fail("A view has " + std::to_string(shape.values()) + " values an image, its map " +
         std::to_string(old.values()) + ".");
  }
  const int64_t root = maps_[static_cast<size_t>(map)].root;
  const int64_t view = add_map(shape);
  maps_[static_cast<size_t>(view)].root = root;
  return view;
}

const MapShape& Program::shape(int64_t map) const {
  require_range("map", map, 0, static_cast<int64_t>(maps_.size()) - 1);
  return maps_[static_cast<size_t>(map)].shape;
}

const MapShape& Program::shape_of(int64_t map, bool packed) const {
  const MapShape& found = shape(map);
  if (found.packed != packed) {
    fail("Map " + std::to_string(map) + " has " + (packed ? "floats" : "bits") + ", wanted " +
         (packed ? "bits." : "floats."));
  }
  return found;
}

void Program::add(std::unique_ptr<Step> step) {
  if (finished_) fail("The program is finished.");
  const int64_t now = steps();
  for (const int64_t map : step->writes) {
    Map& root = maps_[static_cast<size_t>(maps_[static_cast<size_t>(map)].root)];
    if (root.written || map != maps_[static_cast<size_t>(map)].root) {
      fail("Map " + std::to_string(map) + " is written twice.");
    }
    root.written = true;
    root.first = root.last = now;
  }
  for (const int64_t map : step->reads) {
    Map& root = maps_[static_cast<size_t>(maps_[static_cast<size_t>(map)].root)];
    root.last = std::max(root.last, now);
  }
  steps_.push_back(std::move(step));
}

void Program::finish(const std::vector<int64_t>& inputs, const std::vector<int64_t>& outputs) {
  if (finished_) fail("The program is finished.");
  std::vector<bool> defined(maps_.size(), false);
  for (const int64_t map : inputs) {
    require_range("input", map, 0, static_cast<int64_t>(maps_.size()) - 1);
    Map& input = maps_[static_cast<size_t>(map)];
    if (input.written || input.root != map || input.external)
      fail("An input is no map of its own.");
    input.external = true;
    defined[static_cast<size_t>(map)] = true;
  }
  for (const auto& step : steps_) {
    for (const int64_t map : step->reads) {
      if (!defined[static_cast<size_t>(maps_[static_cast<size_t>(map)].root)]) {
        fail("Map " + std::to_string(map) + " is read before it is written.");
      }
    }
    for (const int64_t map : step->writes) defined[static_cast<size_t>(map)] = true;
  }
  for (const int64_t map : outputs) {
    require_range("output", map, 0, static_cast<int64_t>(maps_.size()) - 1);
    Map& root = maps_[static_cast<size_t>(maps_[static_cast<size_t>(map)].root)];
    if (!root.written || root.external) fail("An output is no map of its own.");
    root.external = true;
  }
  inputs_ = inputs;
  outputs_ = outputs;
  place_in_arena();
  finished_ = true;
}

// Gives every internal map the lowest offset that no map needed at the same time covers. A map that
// may be written in place of one that nobody reads later shares its memory.
void Program::place_in_arena() {
  for (int64_t s = 0; s < steps(); ++s) {
    const Step& step = *steps_[static_cast<size_t>(s)];
    if (step.in_place == kNoMap || step.writes.empty()) continue;
    Map& out = maps_[static_cast<size_t>(step.writes[0])];
    const int64_t old = maps_[static_cast<size_t>(step.in_place)].root;
    Map& root = maps_[static_cast<size_t>(old)];
    if (root.external || out.external || root.last != s ||
        root.shape.values() != out.shape.values())
      continue;
    root.last = out.last;
    const int64_t replaced = out.root;
    for (Map& map : maps_) {
      if (map.root == replaced) map.root = old;
    }
  }
  std::vector<size_t> placed;
  for (size_t m = 0; m < maps_.size(); ++m) {
    Map& map = maps_[m];
    if (map.root != static_cast<int64_t>(m) || map.external || !map.written) continue;
    const int64_t bytes = aligned(map.shape.values() * 4);
    std::sort(placed.begin(), placed.end(),
              [&](size_t a, size_t b) { return maps_[a].offset < maps_[b].offset; });
    int64_t offset = 0;
    for (const size_t other : placed) {
      const Map& o = maps_[other];
      if (o.last < map.first || map.last < o.first) continue;
      if (offset + bytes <= o.offset) break;
      offset = std::max(offset, o.offset + aligned(o.shape.values() * 4));
    }
    map.offset = offset;
    arena_bytes_ = std::max(arena_bytes_, offset + bytes);
    placed.push_back(m);
  }
}

int64_t Program::arena_bytes(int64_t batch) const {
  return checked_product("The arena", {batch, arena_bytes_});
}

std::unique_ptr<Program::PreparedBatch> Program::prepare(const CallShape& shape) const {
  auto prepared = std::make_unique<PreparedBatch>();
  prepared->shape = shape;
  const int64_t bytes = std::max<int64_t>(kAlignment, arena_bytes(shape.batch));
  prepared->arena.reset(
      static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes))));
  if (!prepared->arena) throw std::bad_alloc();
  int64_t most_units = 1;
  for (const auto& step : steps_) {
    prepared->steps.push_back(step->prepare(shape));
    const Job& job = prepared->steps.back()->job;
    prepared->scratch_bytes = std::max(prepared->scratch_bytes, job.scratch_bytes);
    most_units = std::max(most_units, job.units);
  }
  prepared->ranges = std::min(shape.threads, most_units);
  prepared->done = std::make_unique<Counter[]>(steps_.size());
  prepared->taken =
      std::make_unique<Counter[]>(steps_.size() * static_cast<size_t>(prepared->ranges));
  prepared->maps.assign(maps_.size(), nullptr);
  return prepared;
}

std::unique_ptr<Program::PreparedBatch> Program::take(const CallShape& shape) const {
  {
    // Not a wait: a lock that was held when the process forked is never released in the child.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) {
      for (auto at = idle_.rbegin(); at != idle_.rend(); ++at) {
        if (!((*at)->shape == shape)) continue;
        std::unique_ptr<PreparedBatch> prepared = std::move(*at);
        idle_.erase(std::next(at).base());
        return prepared;
      }
    }
  }
  return prepare(shape);
}

void Program::give_back(std::unique_ptr<PreparedBatch> prepared) const {
  std::vector<std::unique_ptr<PreparedBatch>> dropped;  // freed outside of the lock
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  idle_.push_back(std::move(prepared));
  int64_t bytes = 0;
  for (const auto& kept : idle_) bytes += arena_bytes(kept->shape.batch);
  while (idle_.size() > 1 && (idle_.size() > kIdleBatches || bytes > kIdleBytes)) {
    bytes -= arena_bytes(idle_.front()->shape.batch);
    dropped.push_back(std::move(idle_.front()));
    idle_.erase(idle_.begin());
  }
  lock.unlock();
}

void Program::check_memory(const char* what, const std::vector<int64_t>& maps,
                           const std::vector<MapMemory>& memory, int64_t batch) const {
  if (memory.size() != maps.size()) {
    fail(std::string("This program has ") + std::to_string(maps.size()) + " " + what + "s, but " +
         std::to_string(memory.size()) + " came.");
  }
  for (size_t i = 0; i < maps.size(); ++i) {
    const MapShape& shape = maps_[static_cast<size_t>(maps[i])].shape;
    require_memory(what, memory[i].data, memory[i].size,
                   checked_product("The map", {batch, shape.values()}), 4);
  }
}

void Program::run(int64_t batch, const std::vector<MapMemory>& inputs,
                  const std::vector<MapMemory>& outputs, int64_t threads,
                  std::vector<double>* seconds) const {
  if (!finished_) fail("The program is not finished.");
  require_range("batch", batch, 0, std::numeric_limits<int32_t>::max());
  require_range("threads", threads, 1, std::numeric_limits<int32_t>::max());
  check_memory("input", inputs_, inputs, batch);
  check_memory("output", outputs_, outputs, batch);
  CallShape shape{batch, threads, std::vector<bool>(maps_.size(), false)};
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].planar) continue;
    for (const auto& step : steps_) {
      for (const int64_t map : step->reads) {
        const int64_t root = maps_[static_cast<size_t>(map)].root;
        if (root != inputs_[i]) continue;
        if (map != root || !step->takes_planar()) fail("An input must be [N, H, W, C] here.");
      }
    }
    shape.planar[static_cast<size_t>(inputs_[i])] = true;
  }
  if (seconds != nullptr) seconds->assign(steps_.size(), 0.0);
  if (batch == 0) return;
  const int64_t fit = std::max<int64_t>(1, kArenaBytes / std::max<int64_t>(arena_bytes_, 1));
  const int64_t parts = (batch + fit - 1) / fit;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = batch * part / parts;
    shape.batch = batch * (part + 1) / parts - first;
    run_part(shape, first, inputs, outputs, seconds);
  }
}

// Runs the images from `first` on; adds the time at which each step was done to `seconds`.
void Program::run_part(const CallShape& shape, int64_t first, const std::vector<MapMemory>& inputs,
                       const std::vector<MapMemory>& outputs, std::vector<double>* seconds) const {
  std::unique_ptr<PreparedBatch> prepared = take(shape);
  const auto image = [&](const MapMemory& memory, int64_t map) {
    const int64_t values = maps_[static_cast<size_t>(map)].shape.values();
    return static_cast<void*>(static_cast<float*>(memory.data) + first * values);
  };
  for (size_t m = 0; m < maps_.size(); ++m) {
    const int64_t root = maps_[m].root;
    prepared->maps[m] =
        prepared->arena.get() + maps_[static_cast<size_t>(root)].offset * shape.batch;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (root == inputs_[i]) prepared->maps[m] = image(inputs[i], inputs_[i]);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (root == maps_[static_cast<size_t>(outputs_[i])].root) {
        prepared->maps[m] = image(outputs[i], outputs_[i]);
      }
    }
  }
  for (const auto& step : prepared->steps) step->bind(prepared->maps.data());
  prepared->reset();
  std::vector<double> ends(seconds != nullptr ? steps_.size() : 0);
  prepared->seconds = seconds != nullptr ? ends.data() : nullptr;
  const double start = now();
  const auto walk = [](const void* context, int64_t thread, void* scratch) {
    static_cast<const PreparedBatch*>(context)->run(thread, scratch);
  };
  run_job({walk, prepared.get(), shape.threads, prepared->scratch_bytes}, shape.threads);
  for (size_t s = 0; s < ends.size(); ++s) (*seconds)[s] += ends[s] - start;
  for (const auto& step : prepared->steps) step->check();
  give_back(std::move(prepared));
}

}  // namespace biper
