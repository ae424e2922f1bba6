// Resampling is that of Pillow: a pixel is a weighted mean of those in reach of a filter, whose
// reach grows with the scale; weights are rounded to 22 bits, and there are bytes between the two
// passes. The order of these is that of Pillow 13; earlier versions, where that differs, round a
// few pixels of tall images the other way.
#include "images.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "conv.h"

namespace biper {
namespace {

using Kind = Json::Kind;

constexpr int64_t kMostPixels = 1 << 16;  // along one side
constexpr int64_t kMostSide = 1 << 20;    // of a resized image
constexpr int kWeightBits = 22;

// Pixels of one byte for each channel, side by side, rows without gaps.
struct Pixels {
  int64_t height, width, channels;
  std::vector<uint8_t> values;

  Pixels(int64_t h, int64_t w, int64_t c) : height(h), width(w), channels(c) {
    const int64_t size = checked_product("The image", {h, w, c});
    values.assign(static_cast<size_t>(size), 0);
  }

  uint8_t* row(int64_t y) { return values.data() + y * width * channels; }
  const uint8_t* row(int64_t y) const { return values.data() + y * width * channels; }
};

Pixels converted(const biper_image& image, int64_t channels) {
  if (image.pixels == nullptr) fail("The image has no pixels.");
  require_range("height", image.height, 1, kMostPixels);
  require_range("width", image.width, 1, kMostPixels);
  if (image.channels != 1 && image.channels != 3) {
    fail("`channels` (=" + std::to_string(image.channels) + ") of an image must be 1 or 3.");
  }
  const int64_t least = image.width * image.channels;
  const int64_t row_bytes = image.row_bytes == 0 ? least : image.row_bytes;
  if (row_bytes < least) {
    fail("`row_bytes` (=" + std::to_string(row_bytes) + ") of an image must be at least " +
         std::to_string(least) + ", or 0.");
  }
  Pixels made(image.height, image.width, channels);
  for (int64_t y = 0; y < image.height; ++y) {
    const uint8_t* from = image.pixels + y * row_bytes;
    uint8_t* to = made.row(y);
    for (int64_t x = 0; x < image.width; ++x, from += image.channels, to += channels) {
      if (channels == image.channels) {
        std::copy(from, from + channels, to);
      } else if (channels == 3) {
        std::fill(to, to + 3, from[0]);
      } else {  // the luma of ITU-R BT.601 in 16 bits
        to[0] = static_cast<uint8_t>(
            (from[0] * 19595 + from[1] * 38470 + from[2] * 7471 + 0x8000) >> 16);
      }
    }
  }
  return made;
}

// -- resampling -----------------------------------------------------------------------------------

double bilinear(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {  // Keys, with a = -0.5
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// What the pixels of one axis are made of.
struct Taps {
  std::vector<int64_t> first;             // the first pixel that each reads
  std::vector<std::vector<int>> weights;  // of that one and those behind it
};

Taps taps_of(int64_t from, int64_t to, Filter filter) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  const double stretch = std::max(scale, 1.0);
  const double reach = (filter == Filter::kBilinear ? 1.0 : 2.0) * stretch;
  Taps taps;
  for (int64_t i = 0; i < to; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(centre - reach + 0.5));
    const int64_t last = std::min(from, static_cast<int64_t>(centre + reach + 0.5));
    std::vector<double> exact;
    double sum = 0.0;
    for (int64_t x = first; x < last; ++x) {
      const double at = (static_cast<double>(x) - centre + 0.5) * (1.0 / stretch);
      exact.push_back(filter == Filter::kBilinear ? bilinear(at) : bicubic(at));
      sum += exact.back();
    }
    std::vector<int> weights;
    for (double weight : exact) {
      if (sum != 0.0) weight /= sum;
      weight *= 1 << kWeightBits;
      weights.push_back(static_cast<int>(weight < 0 ? weight - 0.5 : weight + 0.5));
    }
    taps.first.push_back(first);
    taps.weights.push_back(std::move(weights));
  }
  return taps;
}

uint8_t weighted(const uint8_t* from, int64_t step, const std::vector<int>& weights) {
  int sum = 1 << (kWeightBits - 1);
  for (const int weight : weights) {
    sum += *from * weight;
    from += step;
  }
  return static_cast<uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
}

Pixels resampled_columns(const Pixels& in, int64_t width, Filter filter) {
  const Taps taps = taps_of(in.width, width, filter);
  Pixels out(in.height, width, in.channels);
  for (int64_t y = 0; y < in.height; ++y) {
    uint8_t* to = out.row(y);
    for (size_t x = 0; x < taps.first.size(); ++x) {
      const uint8_t* from = in.row(y) + taps.first[x] * in.channels;
      for (int64_t c = 0; c < in.channels; ++c) {
        *to++ = weighted(from + c, in.channels, taps.weights[x]);
      }
    }
  }
  return out;
}

Pixels resampled_rows(const Pixels& in, int64_t height, Filter filter) {
  const Taps taps = taps_of(in.height, height, filter);
  Pixels out(height, in.width, in.channels);
  const int64_t row = in.width * in.channels;
  for (int64_t y = 0; y < height; ++y) {
    const size_t tap = static_cast<size_t>(y);
    const uint8_t* from = in.row(taps.first[tap]);
    uint8_t* to = out.row(y);
    for (int64_t i = 0; i < row; ++i) to[i] = weighted(from + i, row, taps.weights[tap]);
  }
  return out;
}

// The pixel that each one takes, -1 where rounding leads out of the image; steps are added up.
std::vector<int64_t> nearest_of(int64_t from, int64_t to) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  std::vector<int64_t> found;
  double at = scale * 0.5;
  for (int64_t i = 0; i < to; ++i, at += scale) {
    const int64_t pixel = at < 0.0 ? -1 : static_cast<int64_t>(at);
    found.push_back(pixel < from ? pixel : -1);
  }
  return found;
}

Pixels nearest(const Pixels& in, int64_t height, int64_t width) {
  Pixels out(height, width, in.channels);
  const std::vector<int64_t> rows = nearest_of(in.height, height),
                             columns = nearest_of(in.width, width);
  for (int64_t y = 0; y < height; ++y) {
    if (rows[static_cast<size_t>(y)] < 0) continue;
    const uint8_t* from = in.row(rows[static_cast<size_t>(y)]);
    uint8_t* to = out.row(y);
    for (const int64_t column : columns) {
      if (column >= 0) std::copy_n(from + column * in.channels, in.channels, to);
      to += in.channels;
    }
  }
  return out;
}

// Sides of the image before it is cropped.
void resized_sides(const Preprocessing& how, const Pixels& in, int64_t* height, int64_t* width) {
  const double tall = std::floor(static_cast<double>(how.height) / how.crop_pct);
  const double wide = std::floor(static_cast<double>(how.width) / how.crop_pct);
  if (tall > kMostSide || wide > kMostSide) fail("The image would be resized to too many pixels.");
  if (tall == wide) {
    const int64_t shorter = std::min(in.height, in.width);
    *height = in.height * static_cast<int64_t>(wide) / shorter;
    *width = in.width * static_cast<int64_t>(wide) / shorter;
  } else {
    const double ratio =
        std::min(static_cast<double>(in.height) / tall, static_cast<double>(in.width) / wide);
    *height = static_cast<int64_t>(std::nearbyint(static_cast<double>(in.height) / ratio));
    *width = static_cast<int64_t>(std::nearbyint(static_cast<double>(in.width) / ratio));
  }
  require_range("height of the resized image", *height, 1, kMostSide);
  require_range("width of the resized image", *width, 1, kMostSide);
}

Pixels resized(const Preprocessing& how, Pixels in) {
  int64_t height = 0, width = 0;
  resized_sides(how, in, &height, &width);
  if (height == in.height && width == in.width) return in;
  if (how.filter == Filter::kNearest) return nearest(in, height, width);
  const bool rows_first = height < in.height && in.height - height > 2 * (in.width - width);
  if (rows_first) in = resampled_rows(in, height, how.filter);
  if (width != in.width) in = resampled_columns(in, width, how.filter);
  if (height != in.height) in = resampled_rows(in, height, how.filter);
  return in;
}

// -- the file's metadata --------------------------------------------------------------------------

double number_of(const Json& value) {
  if (value.is(Kind::kInteger)) return static_cast<double>(value.integer);
  if (!value.is(Kind::kReal)) fail("A number is wanted.");
  return value.real;
}

std::vector<float> numbers_of(const Json* value, const char* key, int64_t channels) {
  if (value == nullptr || !value->is(Kind::kArray) ||
      static_cast<int64_t>(value->items.size()) != channels) {
    fail("`" + std::string(key) + "` has not one entry for each of the " +
         std::to_string(channels) + " channels.");
  }
  std::vector<float> found;
  for (const Json& each : value->items) found.push_back(static_cast<float>(number_of(each)));
  return found;
}

Filter filter_of(const Json* value) {
  const std::string name = value == nullptr ? "bilinear" : value->text;
  if (name == "nearest") return Filter::kNearest;
  if (name == "bilinear") return Filter::kBilinear;
  if (name == "bicubic") return Filter::kBicubic;
  fail("There is no interpolation '" + name.substr(0, 40) + "'.");
}

}  // namespace

Preprocessing preprocessing_of(const Json& metadata) {
  const Json* size = metadata.find("input_size");
  if (size == nullptr || !size->is(Kind::kArray) || size->items.size() != 3) {
    fail("There is no `input_size`.");
  }
  int64_t sides[3];
  for (size_t i = 0; i < 3; ++i) {
    if (!size->items[i].is(Kind::kInteger)) fail("`input_size` must be three integers.");
    sides[i] = size->items[i].integer;
    require_range("input_size", sides[i], 1, kMostPixels);
  }
  if (sides[0] != 1 && sides[0] != 3) fail("`input_size` must have 1 or 3 channels.");
  Preprocessing how{sides[0],
                    sides[1],
                    sides[2],
                    filter_of(metadata.find("interpolation")),
                    1.0,
                    numbers_of(metadata.find("mean"), "mean", sides[0]),
                    numbers_of(metadata.find("std"), "std", sides[0])};
  if (const Json* crop = metadata.find("crop_pct"); crop != nullptr) {
    how.crop_pct = number_of(*crop);
  }
  if (!(how.crop_pct > 0.0 && how.crop_pct <= 1.0)) fail("`crop_pct` must be in (0, 1].");
  for (const float value : how.std) {
    if (!(value > 0.0f)) fail("`std` must be above 0.");
  }
  return how;
}

void prepare_image(const Preprocessing& how, const biper_image& image, float* out) {
  const Pixels pixels = resized(how, converted(image, how.channels));
  const int64_t top =
      static_cast<int64_t>(std::nearbyint(static_cast<double>(pixels.height - how.height) / 2.0));
  const int64_t left =
      static_cast<int64_t>(std::nearbyint(static_cast<double>(pixels.width - how.width) / 2.0));
  for (int64_t c = 0; c < how.channels; ++c) {
    const size_t channel = static_cast<size_t>(c);
    float normalised[256];
    for (int value = 0; value < 256; ++value) {
      normalised[value] =
          (static_cast<float>(value) / 255.0f - how.mean[channel]) / how.std[channel];
    }
    for (int64_t y = top; y < top + how.height; ++y) {
      for (int64_t x = left; x < left + how.width; ++x) {  // black outside of the image
        const bool inside = y >= 0 && y < pixels.height && x >= 0 && x < pixels.width;
        *out++ = normalised[inside ? pixels.row(y)[x * how.channels + c] : 0];
      }
    }
  }
}

}  // namespace biper
