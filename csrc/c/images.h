// Images as the input of a network: what biper_engine/preprocessing.py does, byte for byte.
#pragma once

#include <string>
#include <vector>

#include "biper.h"
#include "json.h"

namespace biper {

enum class Filter { kNearest, kBilinear, kBicubic };

struct Preprocessing {
  int64_t channels, height, width;  // of the network's input
  Filter filter;
  double crop_pct;
  std::vector<float> mean, std;  // of each channel
};

// The preprocessing in a file's metadata. Throws std::invalid_argument where a value is no such.
Preprocessing preprocessing_of(const Json& metadata);

// Writes an image as [C, H, W] float32. Throws std::invalid_argument where it is none.
void prepare_image(const Preprocessing& how, const biper_image& image, float* out);

}  // namespace biper
