// Binary convolutions: validation, prepacked weights, and the plan of a call.
#pragma once

#include <iterator>
#include <string>
#include <vector>

#include "kernels.h"

namespace biper {

// Memory of the caller: where it starts and how many elements it holds. Nothing here owns any.
template <class T>
struct Span {
  T* data = nullptr;
  int64_t size = 0;
};

// A float map, in one of the types that a stream may have.
struct FloatSpan {
  void* data = nullptr;
  int64_t size = 0;
  FloatType type = FloatType::kNone;
};

// Every function here throws std::invalid_argument, with what came and what was wanted, before it
// reads or writes anything where sizes or values do not fit.

// 32-bit words that prepack writes for the kernels in use.
int64_t prepacked_words(const ConvGeometry& geometry);

// Throws unless `weight` has the words of canonical weights.
void require_weight(const ConvGeometry& geometry, Span<const uint32_t> weight);

// Re-lays canonical weights [O, KH, KW, words] for the kernels in use.
void prepack(const ConvGeometry& geometry, Span<const uint32_t> weight, Span<uint32_t> prepacked);

// The parameters of an epilogue. Multiplier and bias are [O]; the others may be empty.
struct EpilogueSpans {
  Span<const float> vectors[std::size(kEpilogueVectors)];  // as in kEpilogueVectors
  Span<const uint8_t> sense, pool_min;                     // bool [O]
  float clamp_min, clamp_max;                              // infinite where there is none

  // The vector that becomes a member of Epilogue, such as &Epilogue::slope.
  Span<const float>& operator[](const float* Epilogue::* member) {
    size_t i = 0;
    while (kEpilogueVectors[i].values != member) ++i;
    return vectors[i];
  }
};

// The images of one call. Outputs that are not wanted are empty.
struct Images {
  int64_t batch, height, width;
  Span<const uint32_t> bits;  // [N, H, W, words]
  FloatSpan residual;         // [N, OH, OW, O], or empty
  FloatSpan out_float;        // [N, OH, OW, O]
  Span<uint32_t> out_bits;    // [N, OH, OW, words]
  Span<const float> gate;     // [gate_images, gate_channels], or empty
  int64_t gate_images = 0;    // N, or 1: for all images
  int64_t gate_channels = 0;  // O, or 1: for all channels
};

// A convolution with fixed weights and epilogue, for images of any size. Of what it is given it
// keeps the address of the prepacked weights; the rest it copies. Calls from several threads are
// safe.
class Conv {
 public:
  // Without an epilogue, for accumulate() alone.
  Conv(const ConvGeometry& geometry, Span<const uint32_t> prepacked);
  Conv(const ConvGeometry& geometry, Span<const uint32_t> prepacked, const Window& pool,
       const EpilogueSpans& epilogue);
  Conv(const Conv&) = delete;
  Conv& operator=(const Conv&) = delete;

  // Writes accumulators [N, OH, OW, O].
  void accumulate(int64_t batch, int64_t height, int64_t width, Span<const uint32_t> bits,
                  Span<int32_t> dots, int64_t threads) const;

  // Writes the epilogue's float map, its bits, or both.
  void run(const Images& images, int64_t threads) const;

  // The plan of a call at one image size, all but its addresses; `raw` without the epilogue's pool.
  ConvPlan plan_for(int64_t batch, int64_t height, int64_t width, bool raw) const;

  // Cuts a plan into units and lays out its scratch; returns how many threads are worth waking.
  int64_t prepare(ConvPlan& plan, int64_t threads) const;

  const ConvGeometry& geometry() const { return geometry_; }
  const Kernels& kernels() const { return *kernels_; }
  bool has_threshold() const { return epilogue_.threshold != nullptr; }
  bool has_offset() const { return epilogue_.offset != nullptr; }
  bool has_epilogue() const { return has_epilogue_; }

 private:
  void count_set_bits();
  void take_bits(ConvPlan& plan, Span<const uint32_t> bits) const;
  void set_gate(ConvPlan& plan, const Images& images) const;
  void start(ConvPlan& plan, int64_t threads) const;

  const Kernels* kernels_;
  const ConvKernels* own_;  // of them, those for these weights
  ConvGeometry geometry_;
  Window pool_{1, 1, 1, 1, 0, 0};
  bool pooled_ = false;
  Epilogue epilogue_{};
  bool has_epilogue_ = false;
  const uint32_t* prepacked_;
  std::vector<float> vectors_;      // of the epilogue
  std::vector<uint32_t> sense_;     // a bit per channel, one spare word
  std::vector<int32_t> pool_sign_;  // [O]
  std::vector<int32_t> set_bits_;   // of the weights, [O]
};

// -- shared with maps.cpp -------------------------------------------------------------------------

// The product of sizes, each at least 0.
int64_t checked_product(const char* what, std::initializer_list<int64_t> sizes);

[[noreturn]] void fail(const std::string& message);

// Throws unless `value` is in [low, high].
void require_range(const char* name, int64_t value, int64_t low, int64_t high);

// Throws unless memory of exactly `wanted` elements, aligned to them, was given.
void require_memory(const char* name, const void* data, int64_t size, int64_t wanted,
                    int64_t element_bytes);

void require_window(const Window& window);

void require_geometry(const ConvGeometry& geometry);

// Positions of a window along one axis; throws where there is none.
int64_t window_positions(const char* what, int64_t size, int64_t kernel, int64_t stride,
                         int64_t pads, int64_t dilation);

// Sets the sizes of a plan's convolution, and of what leaves it, where a pool may follow.
template <class Plan>
void set_sizes(Plan& plan, const ConvGeometry& g) {
  plan.conv_h = window_positions("A kernel", plan.height, g.kernel_h, g.stride_h,
                                 g.pad_top + g.pad_bottom, g.dilation_h);
  plan.conv_w = window_positions("A kernel", plan.width, g.kernel_w, g.stride_w,
                                 g.pad_left + g.pad_right, g.dilation_w);
  plan.out_h = plan.conv_h;
  plan.out_w = plan.conv_w;
  if (!plan.pooled) return;
  const Window& p = plan.pool;
  plan.out_h = window_positions("A pool", plan.conv_h, p.kernel_h, p.stride_h, 2 * p.pad_h, 1);
  plan.out_w = window_positions("A pool", plan.conv_w, p.kernel_w, p.stride_w, 2 * p.pad_w, 1);
}

// A bit per flag, and a spare word.
std::vector<uint32_t> pack_flags(Span<const uint8_t> flags);

}  // namespace biper
