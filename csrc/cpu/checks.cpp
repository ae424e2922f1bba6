// Validation that the functions of several files share.
#include <limits>
#include <stdexcept>

#include "conv.h"

namespace biper {

void fail(const std::string& message) { throw std::invalid_argument(message); }

void require_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  fail("`" + std::string(name) + "` (=" + std::to_string(value) + ") must be from " +
       std::to_string(low) + " to " + std::to_string(high) + ".");
}

int64_t checked_product(const char* what, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    const bool fits = size >= 0 && !__builtin_mul_overflow(product, size, &product) &&
                      product <= std::numeric_limits<int64_t>::max() / 64;
    if (!fits) fail(std::string(what) + " is too large for this machine.");
  }
  return product;
}

void require_memory(const char* name, const void* data, int64_t size, int64_t wanted,
                    int64_t element_bytes) {
  if (size != wanted) {
    fail("`" + std::string(name) + "` has " + std::to_string(size) + " elements, but " +
         std::to_string(wanted) + " are wanted.");
  }
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (wanted > 0 && (address == 0 || address % static_cast<uintptr_t>(element_bytes) != 0)) {
    fail("`" + std::string(name) + "` must point to aligned memory.");
  }
}

void require_window(const Window& window) {
  constexpr int64_t kMost = int64_t{1} << 24;
  require_range("pool_kernel_size", window.kernel_h, 1, kMost);
  require_range("pool_kernel_size", window.kernel_w, 1, kMost);
  require_range("pool_stride", window.stride_h, 1, kMost);
  require_range("pool_stride", window.stride_w, 1, kMost);
  require_range("pool_padding", window.pad_h, 0, window.kernel_h / 2);
  require_range("pool_padding", window.pad_w, 0, window.kernel_w / 2);
}

int64_t window_positions(const char* what, int64_t size, int64_t kernel, int64_t stride,
                         int64_t pads, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  if (size < 1 || size + pads < reach) {
    fail(std::string(what) + " of reach " + std::to_string(reach) +
         " does not fit into an axis of size " + std::to_string(size) + " padded by " +
         std::to_string(pads) + ".");
  }
  return (size + pads - reach) / stride + 1;
}

std::vector<uint32_t> pack_flags(Span<const uint8_t> flags) {
  std::vector<uint32_t> words(static_cast<size_t>(flags.size / kWordBits + 2));
  for (int64_t i = 0; i < flags.size; ++i) {
    if (flags.data[i]) words[static_cast<size_t>(i / kWordBits)] |= 1u << (i % kWordBits);
  }
  return words;
}

void require_geometry(const ConvGeometry& g) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  constexpr int64_t kMostReduction = int64_t{1} << 24;  // accumulators stay exact in float32
  require_range("in_channels", g.in_channels, 1, kMost);
  require_range("out_channels", g.out_channels, 1, kMost);
  require_range("groups", g.groups, 1, kMost);
  if (g.in_channels % g.groups != 0 || g.out_channels % g.groups != 0) {
    fail("`groups` must divide `in_channels` and `out_channels`.");
  }
  for (const int64_t value : {g.kernel_h, g.kernel_w}) {
    require_range("kernel_size", value, 1, kMostReduction);
  }
  for (const int64_t value : {g.stride_h, g.stride_w}) require_range("stride", value, 1, kMost);
  for (const int64_t value : {g.pad_top, g.pad_bottom, g.pad_left, g.pad_right}) {
    require_range("padding", value, 0, kMost);
  }
  for (const int64_t value : {g.dilation_h, g.dilation_w}) {
    require_range("dilation", value, 1, kMost);
  }
  const int64_t reduction =
      checked_product("The receptive field", {g.kernel_h, g.kernel_w, g.in_channels / g.groups});
  if (reduction >= kMostReduction) {
    fail("The receptive field has " + std::to_string(reduction) +
         " inputs, but fewer than 2^24 are wanted.");
  }
}

}  // namespace biper
