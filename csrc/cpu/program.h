// A network, or a run of its operators, as one call.
//
// Steps read and write maps: float32 [N, H, W, C] or packed [N, H, W, words], of which one image
// has a fixed size. Maps that are neither inputs nor outputs share one arena by the steps in which
// they are needed. What depends on the batch size, the arena among it, is made at the first call
// and kept for later ones; a call takes it for itself, so that calls from several threads are safe.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "arguments.h"
#include "thread_pool.h"

namespace biper {

// One image of a map.
struct MapShape {
  int64_t height, width, channels;
  bool packed;

  int64_t values() const {  // floats or words
    const int64_t last = packed ? (channels + kWordBits - 1) / kWordBits : channels;
    return height * width * last;
  }
};

// What a batch is prepared for. planar[m]: map m is [N, C, H, W] in it.
struct CallShape {
  int64_t batch, threads;
  std::vector<bool> planar;

  bool operator==(const CallShape& other) const {
    return batch == other.batch && threads == other.threads && planar == other.planar;
  }
};

// A step with everything that a call needs but the addresses of maps.
class PreparedStep {
 public:
  virtual ~PreparedStep() = default;
  virtual void bind(void* const* maps) = 0;

  // Called when all steps are done: throws where the step cannot take a value of this call.
  virtual void check() const {}

  Job job{};
};

class Step {
 public:
  virtual ~Step() = default;
  virtual std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const = 0;
  virtual bool takes_planar() const { return false; }

  std::vector<int64_t> reads, writes;  // maps
  int64_t in_place = kNoMap;           // of `reads`: its memory may become that of writes[0]
};

// Memory of a caller for one map. A planar float map is [N, C, H, W].
struct MapMemory {
  void* data;
  int64_t size;
  bool planar;
};

class Program {
 public:
  Program();
  ~Program();

  // Each returns the map's number.
  int64_t add_map(const MapShape& shape);
  int64_t add_view(int64_t map, const MapShape& shape);  // the same values as another shape

  // Shape of a map; of one that must have floats, or bits.
  const MapShape& shape(int64_t map) const;
  const MapShape& floats(int64_t map) const { return shape_of(map, false); }
  const MapShape& bits(int64_t map) const { return shape_of(map, true); }

  // Adds a step behind the others. Each map is written once, by one step.
  void add(std::unique_ptr<Step> step);

  // Ends the program; only calls come after it.
  void finish(const std::vector<int64_t>& inputs, const std::vector<int64_t>& outputs);

  // Runs all steps. With `seconds`, [steps], also says when each was done, counted from the start
  // and summed over the parts of the batch.
  void run(int64_t batch, const std::vector<MapMemory>& inputs,
           const std::vector<MapMemory>& outputs, int64_t threads,
           std::vector<double>* seconds = nullptr) const;

  // Bytes of the arena for so many images at once.
  int64_t arena_bytes(int64_t batch) const;

  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }

 private:
  struct Map {
    MapShape shape;
    int64_t root;                  // the map whose memory it shares, itself if none
    bool written = false;          // by a step
    bool external = false;         // an input or output
    int64_t first = 0, last = -1;  // steps between which a root is needed
    int64_t offset = 0;            // in the arena, in bytes for one image
  };
  struct PreparedBatch;

  const MapShape& shape_of(int64_t map, bool packed) const;
  void place_in_arena();
  void check_memory(const char* what, const std::vector<int64_t>& maps,
                    const std::vector<MapMemory>& memory, int64_t batch) const;
  void run_part(const CallShape& shape, int64_t first, const std::vector<MapMemory>& inputs,
                const std::vector<MapMemory>& outputs, std::vector<double>* seconds) const;
  std::unique_ptr<PreparedBatch> prepare(const CallShape& shape) const;
  std::unique_ptr<PreparedBatch> take(const CallShape& shape) const;
  void give_back(std::unique_ptr<PreparedBatch> prepared) const;

  std::vector<Map> maps_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<int64_t> inputs_, outputs_;
  bool finished_ = false;
  int64_t arena_bytes_ = 0;   // for one image
  mutable std::mutex mutex_;  // guards idle_
  mutable std::vector<std::unique_ptr<PreparedBatch>> idle_;
};

}  // namespace biper
