#include "refusals.h"

#include <exception>
#include <functional>
#include <limits>
#include <stdexcept>

#include "conv.h"
#include "dispatch.h"
#include "maps.h"
#include "memory.h"

namespace biper {
namespace {

constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();
constexpr int64_t kTooLarge = int64_t{1} << 31;
constexpr uint8_t kCanary = 0xa5;

// Fits: 33 channels of 6 x 5 pixels, two images, to 5 channels of the same size.
constexpr ConvGeometry kGeometry{33, 5, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1};
constexpr int64_t kBatch = 2, kHeight = 6, kWidth = 5;
constexpr int64_t kPixels = kBatch * kHeight * kWidth;

// Typed memory full of canaries.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : memory_(size * static_cast<int64_t>(sizeof(T)), 0, kCanary) {}

  Span<T> span() {
    return {reinterpret_cast<T*>(memory_.data()), memory_.size() / static_cast<int64_t>(sizeof(T))};
  }
  bool is_untouched() {
    const uint8_t* bytes = memory_.data();
    for (int64_t i = 0; i < memory_.size(); ++i) {
      if (bytes[i] != kCanary) return false;
    }
    return true;
  }

 private:
  Memory memory_;
};

template <class T>
Span<const T> read_only(const Span<T>& span) {
  return {span.data, span.size};
}

template <class T>
FloatSpan floats(const Span<T>& span, FloatType type = FloatType::kFloat32) {
  return {span.data, span.size, type};
}

// Spans that differ from one that fits: a size off by one, no memory, memory between elements.
template <class T>
std::vector<Span<T>> misfits(const Span<T>& span) {
  using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
  std::vector<Span<T>> spans = {
      {span.data, span.size + 1}, {span.data, span.size - 1}, {span.data, 0},       {span.data, -1},
      {span.data, kHighest},      {span.data, kLowest},       {nullptr, span.size},
  };
  if (sizeof(T) > 1) {
    spans.push_back({reinterpret_cast<T*>(reinterpret_cast<Bytes*>(span.data) + 1), span.size});
  }
  return spans;
}

// Everything that calls are made of; one call changes one part of it.
struct Operands {
  Array<uint32_t> weight{5 * 9 * 2}, bits{kPixels * 2}, out_bits{kPixels}, map_bits{kPixels * 2};
  Array<uint32_t> prepacked{prepacked_words(kGeometry)}, fresh{prepacked_words(kGeometry)};
  Array<int32_t> dots{kPixels * 5};
  Array<float> channel{5}, out_float{kPixels * 5}, residual{kPixels * 5}, map{kPixels * 33};
  Array<float> map_channel{33};
  Array<uint8_t> flags{5}, map_flags{33};

  Operands() { prepack(kGeometry, read_only(weight.span()), prepacked.span()); }

  EpilogueSpans epilogue() {
    EpilogueSpans e;
    for (Span<const float>& vector : e.vectors) vector = read_only(channel.span());
    e.sense = e.pool_min = read_only(flags.span());
    e.clamp_min = -1.0f;
    e.clamp_max = 1.0f;
    return e;
  }
  Images images() {
    return {kBatch,
            kHeight,
            kWidth,
            read_only(bits.span()),
            floats(residual.span()),
            floats(out_float.span()),
            out_bits.span(),
            read_only(channel.span()),
            1,
            5};
  }
  bool outputs_are_untouched() {
    return out_bits.is_untouched() && out_float.is_untouched() && dots.is_untouched() &&
           fresh.is_untouched() && map.is_untouched() && map_bits.is_untouched();
  }
};

class Collector {
 public:
  Operands operands;
  Refusals refusals;

  void refuse(const std::string& name, const std::function<void()>& call) {
    ++refusals.calls;
    try {
      call();
      refusals.failures.push_back(name + " was not refused");
    } catch (const std::invalid_argument& error) {
      if (*error.what() == '\0') refusals.failures.push_back(name + " was refused without a word");
    } catch (const std::exception& error) {
      refusals.failures.push_back(name + " ended otherwise: " + error.what());
    }
    if (!operands.outputs_are_untouched()) refusals.failures.push_back(name + " wrote something");
  }

  void refuse_geometry(const std::string& name, const ConvGeometry& geometry) {
    const Span<const uint32_t> weight = read_only(operands.weight.span());
    const Span<const uint32_t> prepacked = read_only(operands.prepacked.span());
    refuse(name + ", prepack", [&] { prepack(geometry, weight, operands.fresh.span()); });
    refuse(name + ", Conv", [&] { Conv(geometry, prepacked); });
  }

  Conv plain() { return Conv(kGeometry, read_only(operands.prepacked.span())); }
  Conv pooled(const Window& pool, const EpilogueSpans& epilogue) {
    return Conv(kGeometry, read_only(operands.prepacked.span()), pool, epilogue);
  }
};

constexpr Window kNoPool{1, 1, 1, 1, 0, 0};

void geometries(Collector& c) {
  static_assert(sizeof(ConvGeometry) == 13 * sizeof(int64_t), "fields are walked by index");
  for (int64_t field = 0; field < 13; ++field) {
    const bool is_padding = field >= 7 && field <= 10;
    for (const int64_t value : {kLowest, int64_t{-1}, int64_t{0}, kTooLarge, kHighest}) {
      if (is_padding && value == 0) continue;
      ConvGeometry geometry = kGeometry;
      std::memcpy(reinterpret_cast<char*>(&geometry) + field * 8, &value, sizeof value);
      const std::string name = "field " + std::to_string(field) + " = " + std::to_string(value);
      c.refuse(name, [&] { prepacked_words(geometry); });
      c.refuse_geometry(name, geometry);
    }
  }
  for (const int64_t groups : {int64_t{2}, int64_t{5}, int64_t{33}, kTooLarge - 1}) {
    ConvGeometry geometry = kGeometry;
    geometry.groups = groups;
    c.refuse("indivisible groups", [&] { prepacked_words(geometry); });
  }
  ConvGeometry wide = kGeometry;
  wide.in_channels = kTooLarge - 1;
  c.refuse("2^24 inputs of an accumulator", [&] { prepacked_words(wide); });
  wide = kGeometry;
  wide.kernel_h = wide.kernel_w = int64_t{1} << 24;
  c.refuse("a receptive field of 2^48", [&] { prepacked_words(wide); });
  wide = {1 << 30, 1 << 30, 1 << 30, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1};
  c.refuse_geometry("2^30 groups", wide);
  wide = {33 << 10, kTooLarge - 1, 1, 22, 22, 1, 1, 0, 0, 0, 0, 1, 1};
  c.refuse_geometry("2^31 filters", wide);
}

void weights(Collector& c) {
  const Span<const uint32_t> weight = read_only(c.operands.weight.span());
  for (const auto& span : misfits(weight)) {
    c.refuse("weight", [&] { prepack(kGeometry, span, c.operands.fresh.span()); });
  }
  for (const auto& span : misfits(c.operands.fresh.span())) {
    c.refuse("prepacked to write", [&] { prepack(kGeometry, weight, span); });
  }
  for (const auto& span : misfits(read_only(c.operands.prepacked.span()))) {
    c.refuse("prepacked to read", [&] { Conv(kGeometry, span); });
  }
  const Span<uint32_t> prepacked = c.operands.prepacked.span();
  for (int64_t word = 0; word < 16; ++word) {
    prepacked.data[word] ^= 1u << (word % 32);
    c.refuse("header word " + std::to_string(word), [&] { c.plain(); });
    prepacked.data[word] ^= 1u << (word % 32);
  }
  ConvGeometry other = kGeometry;
  other.in_channels = 34;  // of as many words
  c.refuse("weights of other channels", [&] { Conv(other, read_only(prepacked)); });
}

void weights_of_other_isas(Collector& c) {
  const std::string own = kernels().name;
  for (const std::string& isa : usable_isas()) {
    if (isa == own) continue;
    select_isa(isa);
    Array<uint32_t> other(prepacked_words(kGeometry));
    prepack(kGeometry, read_only(c.operands.weight.span()), other.span());
    select_isa(own);
    c.refuse("weights of " + isa, [&] { Conv(kGeometry, read_only(other.span())); });
  }
  for (const char* name : {"", "sse9", "neon "}) {
    c.refuse("instruction set '" + std::string(name) + "'", [&] { select_isa(name); });
  }
}

void images(Collector& c) {
  const Conv conv = c.plain();
  const Span<const uint32_t> bits = read_only(c.operands.bits.span());
  const Span<int32_t> dots = c.operands.dots.span();
  const auto call = [&](int64_t batch, int64_t height, int64_t width, int64_t threads) {
    const std::string name = "batch " + std::to_string(batch) + ", height " +
                             std::to_string(height) + ", width " + std::to_string(width) +
                             ", threads " + std::to_string(threads);
    c.refuse(name, [&] { conv.accumulate(batch, height, width, bits, dots, threads); });
  };
  for (const int64_t value : {kLowest, int64_t{-1}, int64_t{0}, int64_t{1}, kTooLarge, kHighest}) {
    call(value, kHeight, kWidth, 1);
    call(kBatch, value, kWidth, 1);
    call(kBatch, kHeight, value, 1);
    if (value != 1) call(kBatch, kHeight, kWidth, value);
  }
  call(kTooLarge - 1, kTooLarge - 1, kTooLarge - 1, 1);
  for (const auto& span : misfits(bits)) {
    c.refuse("bits", [&] { conv.accumulate(kBatch, kHeight, kWidth, span, dots, 1); });
  }
  for (const auto& span : misfits(dots)) {
    c.refuse("dots", [&] { conv.accumulate(kBatch, kHeight, kWidth, bits, span, 1); });
  }
}

// Kernels that reach further than a strip may: each fits into its padded image.
void reaches(Collector& c) {
  constexpr int64_t kFar = int64_t{1} << 30;
  for (const auto& [down, across] :
       {std::pair{kFar, int64_t{1}}, {int64_t{1}, kFar}, {kFar, kFar}}) {
    const ConvGeometry far{33, 5, 1, 3, 3, 1, 1, down, down, across, across, down, across};
    Array<uint32_t> prepacked(prepacked_words(far)), bits(2), out(5);
    prepack(far, read_only(c.operands.weight.span()), prepacked.span());
    const Conv conv(far, read_only(prepacked.span()));
    const Span<uint32_t> to = out.span();
    const Span<int32_t> dots{reinterpret_cast<int32_t*>(to.data), to.size};
    c.refuse("a dilation of 2^30",
             [&] { conv.accumulate(1, 1, 1, read_only(bits.span()), dots, 1); });
  }
  ConvGeometry large = kGeometry;
  large.kernel_h = kHeight + 3;
  Array<uint32_t> weight(5 * large.kernel_h * 3 * 2), prepacked(prepacked_words(large));
  prepack(large, read_only(weight.span()), prepacked.span());
  const Conv conv(large, read_only(prepacked.span()));
  c.refuse("a kernel beyond its image", [&] {
    conv.accumulate(kBatch, kHeight, kWidth, read_only(c.operands.bits.span()),
                    c.operands.dots.span(), 1);
  });
}

void epilogues(Collector& c) {
  const EpilogueSpans good = c.operands.epilogue();
  for (size_t i = 0; i < std::size(good.vectors); ++i) {
    for (const auto& span : misfits(good.vectors[i])) {
      EpilogueSpans bad = good;
      bad.vectors[i] = span;
      c.refuse("a float of each channel", [&] { c.pooled(kNoPool, bad); });
    }
  }
  for (const auto member : {&EpilogueSpans::sense, &EpilogueSpans::pool_min}) {
    for (const auto& span : misfits(good.*member)) {
      EpilogueSpans bad = good;
      bad.*member = span;
      c.refuse("a flag of each channel", [&] { c.pooled(kNoPool, bad); });
    }
  }
  for (const auto member : {&Epilogue::multiplier, &Epilogue::bias}) {
    EpilogueSpans bad = good;
    bad[member] = {};
    c.refuse("no multiplier or no bias", [&] { c.pooled(kNoPool, bad); });
  }
}

// Calls `use` with windows that do not fit anywhere.
void windows(const std::function<void(const std::string&, const Window&)>& use) {
  for (int64_t field = 0; field < 6; ++field) {
    for (const int64_t value : {kLowest, int64_t{-1}, int64_t{0}, kTooLarge, kHighest}) {
      if (field >= 4 && value == 0) continue;
      Window window{3, 3, 2, 2, 1, 1};
      std::memcpy(reinterpret_cast<char*>(&window) + field * 8, &value, sizeof value);
      use("window field " + std::to_string(field) + " = " + std::to_string(value), window);
    }
  }
  use("padding above half the window", {3, 2, 1, 1, 2, 1});
  use("padding beside half the window", {2, 3, 1, 1, 1, 2});
}

void fused(Collector& c) {
  windows([&c](const std::string& name, const Window& window) {
    c.refuse(name, [&] { c.pooled(window, c.operands.epilogue()); });
  });
  const Conv conv = c.pooled(kNoPool, c.operands.epilogue());
  const Images good = c.operands.images();
  const auto call = [&](const std::string& name, const Images& bad) {
    c.refuse(name, [&] { conv.run(bad, 2); });
  };
  for (const auto& span : misfits(c.operands.out_bits.span())) {
    Images bad = good;
    bad.out_bits = span;
    call("out_bits", bad);
  }
  for (const auto& span : misfits(c.operands.out_float.span())) {
    Images bad = good;
    bad.out_float = floats(span);
    call("out_float", bad);
    bad = good;
    bad.residual = floats(span);
    call("residual", bad);
  }
  for (const auto& span : misfits(c.operands.channel.span())) {
    Images bad = good;
    bad.gate = read_only(span);
    call("gate", bad);
  }
  for (const auto& [images, channels] :
       {std::pair<int64_t, int64_t>{0, 5}, {kBatch + 1, 5}, {1, 4}, {1, 0}, {-1, 5}, {5, 1}}) {
    Images bad = good;
    bad.gate_images = images;
    bad.gate_channels = channels;
    call("sizes of a gate", bad);
  }
  Images alone = good;
  alone.gate = {};
  call("an offset without a gate", alone);
  EpilogueSpans without = c.operands.epilogue();
  without[&Epilogue::threshold] = {};
  c.refuse("bits without a threshold", [&] { c.pooled(kNoPool, without).run(good, 1); });
  c.refuse("an epilogue that is not there", [&] { c.plain().run(good, 1); });
  c.refuse("outputs of another pool",
           [&] { c.pooled({2, 2, 2, 2, 0, 0}, c.operands.epilogue()).run(good, 1); });
  c.refuse("a pool beyond its map",
           [&] { c.pooled({9, 9, 1, 1, 0, 0}, c.operands.epilogue()).run(good, 1); });
}

void binary_maps(Collector& c) {
  Operands& o = c.operands;
  const FloatSpan x = floats(o.map.span());
  const Span<uint32_t> bits = o.map_bits.span();
  const auto call = [&](const std::string& name, int64_t pixels, int64_t channels,
                        const FloatSpan& map, const Span<uint32_t>& words, int64_t threads) {
    c.refuse(name + ", binarize", [&] { binarize(pixels, channels, map, {}, {}, words, threads); });
    c.refuse(name + ", unbinarize",
             [&] { unbinarize(pixels, channels, read_only(words), map, threads); });
  };
  for (const int64_t value : {kLowest, int64_t{-1}, int64_t{0}, kTooLarge, kHighest}) {
    call("pixels", value, 33, x, bits, 1);
    call("channels", kPixels, value, x, bits, 1);
    call("threads", kPixels, 33, x, bits, value);
  }
  call("a map without a type", kPixels, 33, floats(o.map.span(), FloatType::kNone), bits, 1);
  for (const auto& span : misfits(o.map.span())) call("x", kPixels, 33, floats(span), bits, 1);
  for (const auto& span : misfits(bits)) call("bits", kPixels, 33, x, span, 1);
  for (const auto& span : misfits(read_only(o.map_channel.span()))) {
    c.refuse("thresholds", [&] { binarize(kPixels, 33, x, span, {}, bits, 1); });
  }
  for (const auto& span : misfits(read_only(o.map_flags.span()))) {
    c.refuse("senses", [&] { binarize(kPixels, 33, x, {}, span, bits, 1); });
  }
}

void pools(Collector& c) {
  Operands& o = c.operands;
  const Span<const uint32_t> bits = read_only(o.bits.span());
  const Span<uint32_t> out = o.map_bits.span();
  windows([&](const std::string& name, const Window& window) {
    c.refuse(name + ", maxpool",
             [&] { maxpool(kBatch, kHeight, kWidth, 33, window, bits, {}, out, 1); });
  });
  const auto call = [&](const std::string& name, int64_t batch, int64_t height, int64_t width,
                        int64_t channels, int64_t threads) {
    c.refuse(name,
             [&] { maxpool(batch, height, width, channels, kNoPool, bits, {}, out, threads); });
  };
  for (const int64_t value : {kLowest, int64_t{-1}, int64_t{0}, kTooLarge, kHighest}) {
    call("batch of a pool", value, kHeight, kWidth, 33, 1);
    call("height of a pool", kBatch, value, kWidth, 33, 1);
    call("width of a pool", kBatch, kHeight, value, 33, 1);
    call("channels of a pool", kBatch, kHeight, kWidth, value, 1);
    call("threads of a pool", kBatch, kHeight, kWidth, 33, value);
  }
  call("2^93 pixels", kTooLarge - 1, kTooLarge - 1, kTooLarge - 1, kTooLarge - 1, 1);
  for (const auto& span : misfits(bits)) {
    c.refuse("bits of a pool",
             [&] { maxpool(kBatch, kHeight, kWidth, 33, kNoPool, span, {}, out, 1); });
  }
  for (const auto& span : misfits(out)) {
    c.refuse("out of a pool",
             [&] { maxpool(kBatch, kHeight, kWidth, 33, kNoPool, bits, {}, span, 1); });
  }
  for (const auto& span : misfits(read_only(o.map_flags.span()))) {
    c.refuse("take_and",
             [&] { maxpool(kBatch, kHeight, kWidth, 33, kNoPool, bits, span, out, 1); });
  }
}

}  // namespace

Refusals refusals() {
  Collector collector;
  for (const auto& calls : {geometries, weights, weights_of_other_isas, images, reaches, epilogues,
                            fused, binary_maps, pools}) {
    calls(collector);
  }
  return collector.refusals;
}

}  // namespace biper
