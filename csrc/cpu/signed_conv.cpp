#include "signed_conv.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr int64_t kMost = (int64_t{1} << 31) - 1;
// Values of a unit: packing them takes some 10 us, below which waking another thread costs more
// than it brings.
constexpr int64_t kValuesPerUnit = int64_t{1} << 17;

int64_t words_of(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

struct Packing {
  SignsCall call;
  int64_t pixels, step;
  std::atomic<bool> all{true};
};

void pack_unit(const void* memory, int64_t unit, void*) {
  Packing* p = const_cast<Packing*>(static_cast<const Packing*>(memory));
  if (!p->all.load(std::memory_order_relaxed)) return;
  const int64_t first = unit * p->step, last = std::min(p->pixels, first + p->step);
  if (!kernels().pack_signs(p->call, first, last)) p->all.store(false, std::memory_order_relaxed);
}

// Packs [pixels, channels]; returns whether every value is above or below 0, as its bit says.
bool pack(const float* x, int64_t pixels, int64_t channels, uint32_t* bits, int64_t threads) {
  if (pixels == 0) return true;
  Packing packing{{x, channels, bits}, pixels, std::max<int64_t>(1, kValuesPerUnit / channels)};
  run_job({pack_unit, &packing, (pixels + packing.step - 1) / packing.step, 0}, threads);
  return packing.all.load(std::memory_order_relaxed);
}

}  // namespace

bool signed_conv(const ConvGeometry& g, int64_t batch, int64_t height, int64_t width,
                 Span<const float> x, Span<const float> weight, Span<const float> alpha,
                 Span<float> out, int64_t threads) {
  require_geometry(g);
  require_range("threads", threads, 1, kMost);
  require_range("batch", batch, 0, kMost);
  require_range("height", height, 1, kMost);
  require_range("width", width, 1, kMost);
  const int64_t pixels = checked_product("The map", {batch, height, width});
  const int64_t taps = checked_product("The weights", {g.out_channels, g.kernel_h, g.kernel_w});
  const int64_t depth = g.in_channels / g.groups;
  require_memory("x", x.data, x.size, checked_product("The map", {pixels, g.in_channels}), 4);
  require_memory("weight", weight.data, weight.size, checked_product("The weights", {taps, depth}),
                 4);
  require_memory("alpha", alpha.data, alpha.size, g.out_channels, 4);
  const int64_t out_h = window_positions("A kernel", height, g.kernel_h, g.stride_h,
                                         g.pad_top + g.pad_bottom, g.dilation_h);
  const int64_t out_w = window_positions("A kernel", width, g.kernel_w, g.stride_w,
                                         g.pad_left + g.pad_right, g.dilation_w);
  require_memory("out", out.data, out.size,
                 checked_product("The result", {batch, out_h, out_w, g.out_channels}), 4);
  // Not set to 0 before it is written.
  const std::unique_ptr<uint32_t[]> bits(new uint32_t[pixels * words_of(g.in_channels)]);
  const std::unique_ptr<uint32_t[]> canonical(new uint32_t[taps * words_of(depth)]);
  if (!pack(weight.data, taps, depth, canonical.get(), threads)) return false;
  if (!pack(x.data, pixels, g.in_channels, bits.get(), threads)) return false;

  std::vector<uint32_t> prepacked(prepacked_words(g));
  const Span<uint32_t> laid{prepacked.data(), static_cast<int64_t>(prepacked.size())};
  prepack(g, {canonical.get(), taps * words_of(depth)}, laid);
  // fma(alpha, sum, -0.0) is alpha * sum also where that is -0.0.
  const std::vector<float> bias(g.out_channels, -0.0f);
  EpilogueSpans epilogue{};
  epilogue[&Epilogue::multiplier] = alpha;
  epilogue[&Epilogue::bias] = {bias.data(), g.out_channels};
  epilogue.clamp_min = -std::numeric_limits<float>::infinity();
  epilogue.clamp_max = std::numeric_limits<float>::infinity();
  const Conv conv(g, {laid.data, laid.size}, {1, 1, 1, 1, 0, 0}, epilogue);
  Images images;
  images.batch = batch;
  images.height = height;
  images.width = width;
  images.bits = {bits.get(), pixels * words_of(g.in_channels)};
  images.out_float = {out.data, out.size, FloatType::kFloat32};
  conv.run(images, threads);
  return true;
}

}  // namespace biper
