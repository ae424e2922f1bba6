// Checks the operands of map kernels and cuts their work into ranges of pixels or rows.
#include "maps.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr int64_t kMost = (int64_t{1} << 31) - 1;
// Channels of work, some 10 us, below which waking another thread costs more than it brings.
constexpr int64_t kChannelsPerUnit = int64_t{1} << 17;

int64_t words_of(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

void require_optional(const char* name, const void* data, int64_t size, int64_t wanted,
                      int64_t bytes) {
  if (data != nullptr || size != 0) require_memory(name, data, size, wanted, bytes);
}

// Calls run(first, last) for ranges that cover [0, count), each item worth `channels` of work.
template <class Run>
void for_ranges(int64_t count, int64_t channels, int64_t threads, const Run& run) {
  require_range("threads", threads, 1, kMost);
  if (count == 0) return;
  struct Context {
    const Run* run;
    int64_t count, step;
  };
  const int64_t step = std::max<int64_t>(1, kChannelsPerUnit / std::max<int64_t>(channels, 1));
  const Context context{&run, count, step};
  const auto run_unit = [](const void* memory, int64_t unit, void*) {
    const Context* c = static_cast<const Context*>(memory);
    (*c->run)(unit * c->step, std::min(c->count, (unit + 1) * c->step));
  };
  run_job({run_unit, &context, (count + step - 1) / step, 0}, threads);
}

}  // namespace

void binarize(int64_t pixels, int64_t channels, const FloatSpan& x, Span<const float> threshold,
              Span<const uint8_t> sense, Span<uint32_t> bits, int64_t threads) {
  require_range("channels", channels, 1, kMost);
  if (x.type == FloatType::kNone) fail("`x` must have a type.");
  require_memory("x", x.data, x.size, checked_product("The map", {pixels, channels}),
                 float_bytes(x.type));
  require_memory("bits", bits.data, bits.size,
                 checked_product("The map", {pixels, words_of(channels)}), 4);
  require_optional("threshold", threshold.data, threshold.size, channels, 4);
  require_optional("sense", sense.data, sense.size, channels, 1);
  const std::vector<uint32_t> flags = pack_flags(sense);
  const BinarizeCall call{
      x.data, x.type, channels, threshold.data, sense.data ? flags.data() : nullptr, bits.data};
  const Kernels& isa = kernels();
  for_ranges(pixels, channels, threads,
             [&](int64_t first, int64_t last) { isa.binarize(call, first, last); });
}

void unbinarize(int64_t pixels, int64_t channels, Span<const uint32_t> bits, const FloatSpan& x,
                int64_t threads) {
  require_range("channels", channels, 1, kMost);
  if (x.type == FloatType::kNone) fail("`x` must have a type.");
  require_memory("x", x.data, x.size, checked_product("The map", {pixels, channels}),
                 float_bytes(x.type));
  require_memory("bits", bits.data, bits.size,
                 checked_product("The map", {pixels, words_of(channels)}), 4);
  const UnbinarizeCall call{bits.data, channels, x.data, x.type};
  const Kernels& isa = kernels();
  for_ranges(pixels, channels, threads,
             [&](int64_t first, int64_t last) { isa.unbinarize(call, first, last); });
}

void maxpool(int64_t batch, int64_t height, int64_t width, int64_t channels, const Window& window,
             Span<const uint32_t> bits, Span<const uint8_t> take_and, Span<uint32_t> out,
             int64_t threads) {
  require_range("batch", batch, 0, kMost);
  require_range("height", height, 1, kMost);
  require_range("width", width, 1, kMost);
  require_range("channels", channels, 1, kMost);
  require_window(window);
  const int64_t words = words_of(channels);
  const int64_t out_h =
      window_positions("A pool", height, window.kernel_h, window.stride_h, 2 * window.pad_h, 1);
  const int64_t out_w =
      window_positions("A pool", width, window.kernel_w, window.stride_w, 2 * window.pad_w, 1);
  require_memory("bits", bits.data, bits.size,
                 checked_product("The map", {batch, height, width, words}), 4);
  require_memory("out", out.data, out.size,
                 checked_product("The map", {batch, out_h, out_w, words}), 4);
  require_optional("take_and", take_and.data, take_and.size, channels, 1);
  const std::vector<uint32_t> flags = pack_flags(take_and);
  const PoolCall call{bits.data, height, width,
                      channels,  words,  window,
                      out_h,     out_w,  take_and.data ? flags.data() : nullptr,
                      out.data};
  const Kernels& isa = kernels();
  for_ranges(batch * out_h, channels * out_w, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) isa.maxpool_row(call, row);
  });
}

}  // namespace biper
