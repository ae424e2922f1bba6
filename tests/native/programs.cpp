#include "programs.h"

#include <cstring>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "program.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Window kNoPool{1, 1, 1, 1, 0, 0};

// Numbers that every machine makes alike: multiples of 1/512.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float value(float scale) {
    return static_cast<float>(static_cast<int32_t>(bits() % 2001) - 1000) / 512.0f * scale;
  }
  std::vector<float> values(int64_t count, float scale) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& value_of : made) value_of = value(scale);
    return made;
  }

 private:
  uint64_t state_;
};

template <class T>
Span<const T> span(const std::vector<T>& values) {
  return {values.data(), static_cast<int64_t>(values.size())};
}

// A program and all that it keeps the addresses of.
class Network {
 public:
  explicit Network(uint64_t seed) : numbers(seed) {}

  int64_t map(int64_t height, int64_t width, int64_t channels, bool packed = false) {
    return program.add_map({height, width, channels, packed});
  }

  std::shared_ptr<const Conv> conv(const ConvGeometry& g, const Window& pool) {
    const int64_t words = (g.in_channels / g.groups + 31) / 32;
    std::vector<uint32_t> weight(
        static_cast<size_t>(g.out_channels * g.kernel_h * g.kernel_w * words));
    for (uint32_t& word : weight) word = numbers.bits();
    const int64_t used = g.in_channels / g.groups - (words - 1) * 32;
    for (size_t w = static_cast<size_t>(words) - 1; w < weight.size(); w += words) {
      if (used < 32) weight[w] &= (1u << used) - 1;
    }
    kept_words_.emplace_back(static_cast<size_t>(prepacked_words(g)));
    std::vector<uint32_t>& prepacked = kept_words_.back();
    prepack(g, span(weight), {prepacked.data(), static_cast<int64_t>(prepacked.size())});
    EpilogueSpans epilogue{};
    epilogue.multiplier = keep(numbers.values(g.out_channels, 0.05f));
    epilogue.bias = keep(numbers.values(g.out_channels, 0.3f));
    epilogue.threshold = keep(numbers.values(g.out_channels, 0.2f));
    epilogue.clamp_min = -1.0f;
    epilogue.clamp_max = 1.0f;
    return std::make_shared<Conv>(g, span(prepacked), pool, epilogue);
  }

  std::shared_ptr<const FloatConv> float_conv(const ConvGeometry& g, const Window& pool,
                                              float limit) {
    const int64_t depth = g.kernel_h * g.kernel_w * g.in_channels;
    // Small enough that clamps do not hide how sums were rounded.
    const float scale = depth > 100 ? 0.02f : 0.1f;
    const std::vector<float> weight = numbers.values(g.out_channels * depth, scale);
    const std::vector<float> bias = numbers.values(g.out_channels, 0.2f);
    const std::vector<float> threshold = numbers.values(g.out_channels, 0.1f);
    return std::make_shared<FloatConv>(g, span(weight), span(bias),
                                       FloatEpilogue{pool, -limit, limit, span(threshold), {}});
  }

  Numbers numbers;
  Program program;

 private:
  Span<const float> keep(std::vector<float> values) {
    kept_floats_.push_back(std::make_unique<std::vector<float>>(std::move(values)));
    return span(*kept_floats_.back());
  }

  std::vector<std::unique_ptr<std::vector<float>>> kept_floats_;
  std::vector<std::vector<uint32_t>> kept_words_ = reserved();

  static std::vector<std::vector<uint32_t>> reserved() {
    std::vector<std::vector<uint32_t>> words;
    words.reserve(64);  // addresses in it are kept
    return words;
  }
};

constexpr int64_t kHeight = 33, kWidth = 30, kClasses = 21;

ConvGeometry square(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                    int64_t groups = 1) {
  return {in, out, groups, kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1};
}

// A residual network of every kind of step.
std::unique_ptr<Network> network() {
  auto made = std::make_unique<Network>(7);
  Network& n = *made;
  Program& p = n.program;
  const int64_t image = n.map(kHeight, kWidth, 3);
  const int64_t stem = n.map(9, 8, 40), stem_bits = n.map(9, 8, 40, true);
  p.add_float_conv(n.float_conv(square(3, 40, 7, 2, 3), {3, 3, 2, 2, 1, 1}, 1.0f), image, stem,
                   stem_bits);
  const int64_t first = n.map(9, 8, 40), first_bits = n.map(9, 8, 40, true);
  p.add_conv(n.conv(square(40, 40, 3, 1, 1), kNoPool), stem_bits, stem, first, first_bits);
  const int64_t halved = n.map(5, 4, 70), down = n.map(5, 4, 70);
  p.add_average(first, {2, 2, 2, 2, 0, 0}, false, 0, 15, halved);
  p.add_float_conv(n.float_conv(square(40, 70, 1, 2, 0), kNoPool, kInfinity), first, down, kNoMap);
  const int64_t shortcut = n.map(5, 4, 70);
  p.add_sum(halved, down, -1.0f, 1.0f, shortcut);
  const int64_t second = n.map(5, 4, 70), second_bits = n.map(5, 4, 70, true);
  p.add_conv(n.conv(square(40, 70, 3, 2, 1), kNoPool), first_bits, shortcut, second, second_bits);
  const int64_t grouped_bits = n.map(5, 4, 70, true);
  p.add_conv(n.conv(square(70, 70, 3, 1, 1, 2), kNoPool), second_bits, second, kNoMap,
             grouped_bits);
  const int64_t pooled_bits = n.map(2, 2, 70, true);
  p.add_bit_pool(grouped_bits, {2, 2, 2, 2, 0, 0}, {}, pooled_bits);
  const int64_t third = n.map(2, 2, 65);
  p.add_conv(n.conv(square(70, 65, 1, 1, 0), kNoPool), pooled_bits, kNoMap, third, kNoMap);
  const int64_t again = n.map(2, 2, 65, true), last = n.map(2, 2, 65);
  p.add_binarize(third, {}, {}, again);
  p.add_conv(n.conv(square(65, 65, 1, 1, 0), kNoPool), again, third, last, kNoMap);
  const int64_t top = n.map(1, 1, 65);
  p.add_maximum(last, {2, 2, 2, 2, 0, 0}, top);
  const int64_t flat = p.add_view(last, {1, 1, 260, false});
  const int64_t logits = n.map(1, 1, kClasses), others = n.map(1, 1, kClasses);
  p.add_float_conv(n.float_conv(square(260, kClasses, 1, 1, 0), kNoPool, kInfinity), flat, logits,
                   kNoMap);
  p.add_float_conv(n.float_conv(square(65, kClasses, 1, 1, 0), kNoPool, kInfinity), top, others,
                   kNoMap);
  // `down` has every rounding of the stem in it, which the others see through signs alone.
  p.finish({image}, {logits, others, down});
  return made;
}

constexpr int64_t kImages = 5;
constexpr int64_t kValues = kHeight * kWidth * 3;
constexpr int64_t kOutputs[] = {kClasses, kClasses, 5 * 4 * 70};

// The images in [N, C, H, W] or [N, H, W, C].
std::vector<float> images(bool planar) {
  Numbers numbers(11);
  std::vector<float> made(static_cast<size_t>(kImages * kValues));
  for (int64_t n = 0; n < kImages; ++n) {
    for (int64_t pixel = 0; pixel < kHeight * kWidth; ++pixel) {
      for (int64_t c = 0; c < 3; ++c) {
        const int64_t at = planar ? c * kHeight * kWidth + pixel : pixel * 3 + c;
        made[static_cast<size_t>(n * kValues + at)] = numbers.value(1.0f);
      }
    }
  }
  return made;
}

// Runs all images in batches of `batch`; returns the outputs, image after image.
std::vector<uint8_t> outputs(const Program& program, int64_t batch, int64_t threads, bool planar) {
  const std::vector<float> all = images(planar);
  std::vector<uint8_t> made;
  for (int64_t first = 0; first < kImages; first += batch) {
    const int64_t count = std::min(batch, kImages - first);
    std::vector<uint8_t> contents(static_cast<size_t>(count * kValues) * sizeof(float));
    std::memcpy(contents.data(), all.data() + first * kValues, contents.size());
    Memory in(contents, 0);
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<MapMemory> out;
    for (const int64_t values : kOutputs) {
      memory.push_back(std::make_unique<Memory>(count * values * 4, 0, 0xa5));
      out.push_back({memory.back()->data(), count * values, false});
    }
    program.run(count, {{in.data(), count * kValues, planar}}, out, threads);
    for (int64_t n = 0; n < count; ++n) {
      for (size_t o = 0; o < memory.size(); ++o) {
        const uint8_t* row = memory[o]->data() + n * kOutputs[o] * 4;
        made.insert(made.end(), row, row + kOutputs[o] * 4);
      }
    }
  }
  return made;
}

uint64_t hash_of(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 14695981039346656037u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  return hash;
}

// Starts threads for every region, as an OpenMP runtime would that keeps none.
void region_of_new_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, data);
  body(data);
  for (std::thread& thread : team) thread.join();
}

// Callers at once, each of which changes batch size, threads and layout from call to call: more
// settings than a program keeps arenas for, so that those are made, kept, found and dropped.
void run_callers(const Program& program, const std::vector<uint8_t>& wanted, const char* pool,
                 ProgramRuns& found) {
  constexpr int64_t kCallers = 4, kCalls = 6;
  const auto call = [&](int64_t caller) {
    std::vector<std::string> differences;
    Numbers numbers(static_cast<uint64_t>(caller));
    for (int64_t i = 0; i < kCalls; ++i) {
      const int64_t batch = 1 + numbers.bits() % kImages, threads = 1 + numbers.bits() % 4;
      const bool planar = numbers.bits() % 2 == 0;
      if (outputs(program, batch, threads, planar) == wanted) continue;
      differences.push_back(std::string("one of several callers, ") + pool + ", batch " +
                            std::to_string(batch) + ", " + std::to_string(threads) + " threads");
    }
    return differences;
  };
  std::vector<std::future<std::vector<std::string>>> callers;
  for (int64_t i = 0; i < kCallers; ++i) {
    callers.push_back(std::async(std::launch::async, call, i));
  }
  for (auto& caller : callers) {
    for (std::string& difference : caller.get()) found.differences.push_back(difference);
  }
  found.runs += kCallers * kCalls;
}

}  // namespace

ProgramRuns program_runs() {
  ProgramRuns found;
  const std::unique_ptr<Network> made = network();
  const std::vector<uint8_t> wanted = outputs(made->program, kImages, 1, true);
  found.hash = hash_of(wanted);
  const auto run = [&](int64_t batch, int64_t threads, bool planar) {
    return outputs(made->program, batch, threads, planar) == wanted;
  };
  for (const int64_t batch : {1, 2, 5}) {
    for (const int64_t threads : {1, 2, 3}) {
      for (const bool planar : {false, true}) {
        // A new thread has no scratch from larger programs; two at once need two arenas.
        auto one = std::async(std::launch::async, run, batch, threads, planar);
        auto two = std::async(std::launch::async, run, batch, threads, planar);
        found.runs += 2;
        if (one.get() & two.get()) continue;
        found.differences.push_back("batch " + std::to_string(batch) + ", " +
                                    std::to_string(threads) + " threads, " +
                                    (planar ? "planar" : "channels last"));
      }
    }
  }
  run_callers(made->program, wanted, "our pool", found);
  share_threads(region_of_new_threads);
  run_callers(made->program, wanted, "shared threads", found);
  share_threads(nullptr);
  return found;
}

std::vector<std::string> accepted_misfits() {
  std::vector<std::string> accepted;
  const auto refuse = [&](const char* name, const std::function<void(Network&)>& call) {
    Network n(1);
    try {
      call(n);
      accepted.push_back(name);
    } catch (const std::invalid_argument&) {
    }
  };
  const auto step = [&](const char* name, MapShape x, MapShape out,
                        const std::function<void(Network&, int64_t, int64_t)>& add) {
    refuse(name, [&](Network& n) { add(n, n.program.add_map(x), n.program.add_map(out)); });
  };
  const MapShape floats{4, 4, 8, false}, bits{4, 4, 8, true};
  step("another number of channels", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_float_conv(n.float_conv(square(7, 8, 1, 1, 0), kNoPool, 1.0f), x, out, kNoMap);
  });
  step("another size", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_float_conv(n.float_conv(square(8, 8, 3, 1, 0), kNoPool, 1.0f), x, out, kNoMap);
  });
  step("groups", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_float_conv(n.float_conv(square(8, 8, 1, 1, 0, 2), kNoPool, 1.0f), x, out, kNoMap);
  });
  step("bits for floats", bits, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_float_conv(n.float_conv(square(8, 8, 1, 1, 0), kNoPool, 1.0f), x, out, kNoMap);
  });
  step("floats for bits", floats, bits, [](Network& n, int64_t x, int64_t out) {
    n.program.add_conv(n.conv(square(8, 8, 1, 1, 0), kNoPool), x, kNoMap, kNoMap, out);
  });
  step("a sum of two sizes", floats, {2, 8, 8, false},
       [](Network& n, int64_t x, int64_t out) { n.program.add_sum(x, kNoMap, 0, 1, out); });
  step("a window beside the map", floats, {9, 4, 8, false}, [](Network& n, int64_t x, int64_t out) {
    n.program.add_average(x, {1, 1, 1, 1, 0, 0}, true, 0, 0, out);
  });
  step("channels before the first", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_average(x, {1, 1, 1, 1, 0, 0}, true, 0, 1, out);
  });
  step("more padding than half a window", floats, {5, 5, 8, false},
       [](Network& n, int64_t x, int64_t out) {
         n.program.add_maximum(x, {2, 2, 1, 1, 2, 2}, out);
       });
  step("a pool of bits of another size", bits, bits, [](Network& n, int64_t x, int64_t out) {
    n.program.add_bit_pool(x, {2, 2, 2, 2, 0, 0}, {}, out);
  });
  step("a view of other values", floats, floats,
       [](Network& n, int64_t x, int64_t) { n.program.add_view(x, {1, 1, 127, false}); });
  step("a map that is written twice", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_sum(x, kNoMap, 0, 1, out);
    n.program.add_sum(x, kNoMap, 0, 1, out);
  });
  step("an input that is written", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_sum(x, kNoMap, 0, 1, out);
    n.program.finish({out}, {out});
  });
  step("a map that nothing writes", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_sum(x, kNoMap, 0, 1, out);
    n.program.finish({}, {out});
  });
  step("a step after the end", floats, floats, [](Network& n, int64_t x, int64_t out) {
    n.program.add_sum(x, kNoMap, 0, 1, out);
    n.program.finish({x}, {out});
    n.program.add_sum(x, kNoMap, 0, 1, out);
  });
  for (const int64_t map : {int64_t{-2}, int64_t{2}, std::numeric_limits<int64_t>::max()}) {
    step("a map that is not there", floats, floats,
         [map](Network& n, int64_t, int64_t out) { n.program.add_sum(map, kNoMap, 0, 1, out); });
  }
  for (const int64_t size : {int64_t{-1}, int64_t{0}, int64_t{1} << 40}) {
    refuse("a map without a size", [size](Network& n) { n.map(size, 1, 1); });
  }
  const auto call = [&](const char* name, int64_t batch, int64_t in_size, int64_t out_size,
                        bool planar, int64_t threads) {
    step(name, floats, floats, [=](Network& n, int64_t x, int64_t out) {
      n.program.add_sum(x, kNoMap, 0, 1, out);
      n.program.finish({x}, {out});
      Memory in(128 * 4, 0, 0), result(128 * 4, 0, 0);
      n.program.run(batch, {{in.data(), in_size, planar}}, {{result.data(), out_size, false}},
                    threads);
    });
  };
  call("a batch that the input lacks", 2, 128, 256, false, 1);
  call("a negative batch", -1, 128, 128, false, 1);
  call("an output that is too small", 1, 128, 127, false, 1);
  call("a planar input for a sum", 1, 128, 128, true, 1);
  call("no threads", 1, 128, 128, false, 0);
  return accepted;
}

}  // namespace biper
