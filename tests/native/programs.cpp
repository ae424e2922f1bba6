#include "programs.h"

#include <cstring>
#include <deque>
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
#include "network.h"
#include "steps.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr int64_t kHeight = 33, kWidth = 30, kClasses = 21;

// A residual network of every kind of step.
std::unique_ptr<Network> network() {
  auto made = std::make_unique<Network>(7);
  Network& n = *made;
  Program& p = n.program;
  const int64_t image = n.map(kHeight, kWidth, 3);
  const auto stem =
      n.float_conv(square(3, 40, 7, 2, 3), 1.0,
                   {{"x", image}, {"pool", pool({3, 3, 2, 2, 1, 1})}, {"want_bits", true}});
  const auto first =
      n.conv(square(40, 40, 3, 1, 1),
             {{"bits", stem[1]}, {"residual", stem[0]}, {"want_float", true}, {"want_bits", true}});
  const Values around{{"channels_before", int64_t{15}}, {"channels_after", int64_t{15}}};
  Values half{{"x", first[0]}, {"pool", pool({2, 2, 2, 2, 0, 0})}, {"count_padding", false}};
  half["size"] = std::vector<int64_t>{5, 4};
  half.insert(around.begin(), around.end());
  const int64_t halved = n.add("average", half)[0];
  const int64_t down = n.float_conv(square(40, 70, 1, 2, 0), kInfinity, {{"x", first[0]}})[0];
  const int64_t shortcut =
      n.add("sum", {{"a", halved}, {"b", down}, {"clamp_min", -1.0}, {"clamp_max", 1.0}})[0];
  const auto second = n.conv(
      square(40, 70, 3, 2, 1),
      {{"bits", first[1]}, {"residual", shortcut}, {"want_float", true}, {"want_bits", true}});
  const auto grouped = n.conv(
      square(70, 70, 3, 1, 1, 2),
      {{"bits", second[1]}, {"residual", second[0]}, {"want_float", false}, {"want_bits", true}});
  const int64_t pooled =
      n.add("bit_pool", {{"bits", grouped[0]}, {"pool", pool({2, 2, 2, 2, 0, 0})}})[0];
  const Values floats_alone{{"want_float", true}, {"want_bits", false}};
  Values third_of = floats_alone;
  third_of["bits"] = pooled;
  const int64_t third = n.conv(square(70, 65, 1, 1, 0), third_of)[0];
  Values last_of = floats_alone;
  last_of["bits"] = n.add("binarize", {{"x", third}})[0];
  last_of["residual"] = third;
  Values gate_of{{"x", third}, {"pool", pool({2, 2, 2, 2, 0, 0})}, {"count_padding", false}};
  gate_of["size"] = std::vector<int64_t>{1, 1};
  gate_of["channels_before"] = gate_of["channels_after"] = int64_t{0};
  last_of["gate"] = n.add("average", gate_of)[0];
  const std::vector<float> offset = n.numbers.values(65, 0.3f);
  last_of["offset"] = memory(offset);
  const int64_t last = n.conv(square(65, 65, 1, 1, 0), last_of)[0];
  Values top_of{{"x", last}, {"pool", pool({2, 2, 2, 2, 0, 0})}};
  top_of["size"] = std::vector<int64_t>{1, 1};
  const int64_t top = n.add("maximum", top_of)[0];
  const int64_t flat = p.add_view(last, {1, 1, 260, false});
  const int64_t logits = n.float_conv(square(260, kClasses, 1, 1, 0), kInfinity, {{"x", flat}})[0];
  const int64_t others = n.float_conv(square(65, kClasses, 1, 1, 0), kInfinity, {{"x", top}})[0];
  // `down` has every rounding of the stem in it, which the others see through signs alone.
  const int64_t numbers = numbers_of(n, logits, others), parts = parts_of(n, down, grouped[0]);
  p.finish({image}, {logits, others, down, numbers, parts});
  return made;
}

constexpr int64_t kImages = 5;
constexpr int64_t kValues = kHeight * kWidth * 3;
constexpr int64_t kOutputs[] = {kClasses, kClasses, 5 * 4 * 70, kNumbers, kParts};

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
  const auto step = [&](const char* name, MapShape shape,
                        const std::function<void(Network&, int64_t)>& add) {
    refuse(name, [&](Network& n) { add(n, n.program.add_map(shape)); });
  };
  const auto kind = [&](const char* name, MapShape shape, const char* of, const char* map,
                        const Values& more) {
    step(name, shape, [&](Network& n, int64_t x) {
      Values values = more;
      values[map] = x;
      n.add(of, values);
    });
  };
  const MapShape floats{4, 4, 8, false}, bits{4, 4, 8, true};
  const auto float_conv = [&](const char* name, MapShape shape, const ConvGeometry& g) {
    step(name, shape, [&](Network& n, int64_t x) { n.float_conv(g, 1.0, {{"x", x}}); });
  };
  float_conv("another number of channels", floats, square(7, 8, 1, 1, 0));
  float_conv("a kernel beyond its map", floats, square(8, 8, 5, 1, 0));
  float_conv("groups", floats, square(8, 8, 1, 1, 0, 2));
  float_conv("bits for floats", bits, square(8, 8, 1, 1, 0));
  const Values both{{"want_float", true}, {"want_bits", true}};
  const auto conv = [&](const char* name, MapShape shape, const ConvGeometry& g,
                        const char* changed, const Value& value) {
    step(name, shape, [&](Network& n, int64_t x) {
      Values values = both;
      values["bits"] = x;
      values[changed] = value;
      n.conv(g, values);
    });
  };
  const ConvGeometry g = square(8, 8, 1, 1, 0);
  conv("floats for bits", floats, g, "residual", {});
  conv("a residual of another kind", bits, g, "residual", int64_t{0});
  conv("bits of other channels", bits, square(7, 8, 1, 1, 0), "residual", {});
  conv("bits without a threshold", bits, g, "threshold", {});
  conv("no multiplier", bits, g, "multiplier", {});
  conv("a float of one channel only", bits, g, "slope", memory(std::vector<float>(1)));
  conv("flags for floats", bits, g, "shift", memory(std::vector<uint8_t>(8)));
  conv("a float for a flag", bits, g, "want_bits", 1.0);
  conv("a gate of another kind", bits, g, "gate", int64_t{0});
  conv("an offset without a gate", bits, g, "offset", memory(std::vector<float>(8)));
  conv("an unknown argument", bits, g, "door", int64_t{0});
  step("a convolution of which nothing leaves", bits, [&](Network& n, int64_t x) {
    n.conv(g, {{"bits", x}, {"want_float", false}, {"want_bits", false}});
  });
  step("a sum of two sizes", floats,
       [](Network& n, int64_t x) { n.add("sum", {{"a", x}, {"b", n.map(2, 8, 8)}}); });
  kind("a sum of nothing", floats, "sum", "b", {});
  kind("a step of no kind", floats, "difference", "a", {});
  const auto sized = [](int64_t height, int64_t width) {
    return Value(std::vector<int64_t>{height, width});
  };
  const Value whole = pool(kNoPool), wide = pool({2, 2, 1, 1, 2, 2});
  kind("a window beside the map", floats, "average", "x", {{"pool", whole}, {"size", sized(9, 4)}});
  kind("no window", floats, "average", "x", {{"pool", whole}, {"size", sized(4, 0)}});
  kind("one size", floats, "average", "x", {{"pool", whole}, {"size", std::vector<int64_t>{4}}});
  kind("channels before the first", floats, "average", "x",
       {{"pool", whole}, {"size", sized(4, 4)}, {"channels_before", int64_t{-1}}});
  kind("more channels than there may be", floats, "average", "x",
       {{"pool", whole}, {"size", sized(4, 4)}, {"channels_after", int64_t{1} << 31}});
  kind("more padding than half a window", floats, "maximum", "x",
       {{"pool", wide}, {"size", sized(5, 5)}});
  kind("a pool of bits beyond its map", bits, "bit_pool", "bits",
       {{"pool", pool({5, 5, 1, 1, 0, 0})}});
  const auto elementwise = [&](const char* name, const Integers& sizes, const Integers& strides,
                               int64_t offset, const char* function) {
    step(name, floats, [=](Network& n, int64_t x) {
      n.add("elementwise", {{"maps", Integers{x}},
                            {"sizes", sizes},
                            {"strides", strides},
                            {"offsets", Integers{offset}},
                            {"function", std::string(function)}});
    });
  };
  elementwise("a place beyond its map", {8, 16}, {16, 1}, 1, "abs");
  elementwise("a stride beyond its map", {8, 16}, {17, 1}, 0, "abs");
  elementwise("a negative stride", {8}, {-1}, 8, "abs");
  elementwise("too many sizes", Integers(10, 1), Integers(10, 1), 0, "abs");
  elementwise("no size", {}, {}, 0, "abs");
  elementwise("an operand too few", {8}, {1}, 0, "add");
  elementwise("a function that is not there", {8}, {1}, 0, "minus");
  const auto rearrange = [&](const char* name, const Integers& sizes, const Integers& places) {
    kind(name, floats, "rearrange", "x", {{"sizes", sizes}, {"places", places}});
  };
  rearrange("places beyond the map", {2, 2}, {0, 127, 0, 1});
  rearrange("a place before the map", {2}, {0, -2});
  rearrange("too few places", {3}, {0, 1});
  rearrange("too many places", {1}, {0, 1});
  const std::string sum = "sum";
  kind("rows that the map does not have", floats, "rows", "x",
       {{"length", int64_t{7}}, {"function", sum}});
  kind("rows without an end", floats, "rows", "x", {{"length", int64_t{0}}, {"function", sum}});
  kind("a join of other lengths", floats, "join", "",
       {{"maps", Integers{0}}, {"lengths", Integers{127}}, {"count", int64_t{1}}});
  kind("a matrix of other sizes", floats, "matmul", "a",
       {{"b", int64_t{0}},
        {"count", int64_t{1}},
        {"rows", int64_t{16}},
        {"depth", int64_t{8}},
        {"columns", int64_t{8}}});
  step("a filter for another map", floats, [&](Network& n, int64_t x) {
    n.add("depthwise_conv", {{"x", x},
                             {"weight", memory(std::vector<float>(9 * 7))},
                             {"geometry", geometry(square(7, 7, 3, 1, 1, 7))}});
  });
  step("a view of other values", floats,
       [](Network& n, int64_t x) { n.program.add_view(x, {1, 1, 127, false}); });
  step("an input that is written", floats, [](Network& n, int64_t x) {
    const std::vector<int64_t> out = n.add("sum", {{"a", x}});
    n.program.finish(out, out);
  });
  step("a map that nothing writes", floats,
       [](Network& n, int64_t x) { n.program.finish({}, n.add("sum", {{"a", x}})); });
  step("a step after the end", floats, [](Network& n, int64_t x) {
    n.program.finish({x}, n.add("sum", {{"a", x}}));
    n.add("sum", {{"a", x}});
  });
  for (const int64_t map : {int64_t{-1}, int64_t{-2}, int64_t{1}, int64_t{1} << 62}) {
    step("a map that is not there", floats,
         [map](Network& n, int64_t) { n.add("sum", {{"a", map}}); });
  }
  for (const int64_t size : {int64_t{-1}, int64_t{0}, int64_t{1} << 40}) {
    refuse("a map without a size", [size](Network& n) { n.map(size, 1, 1); });
  }
  const auto call = [&](const char* name, int64_t batch, int64_t in_size, int64_t out_size,
                        bool planar, int64_t threads) {
    step(name, floats, [=](Network& n, int64_t x) {
      n.program.finish({x}, n.add("sum", {{"a", x}}));
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
