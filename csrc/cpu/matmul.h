// Products of matrices on bits: validation, weights re-laid for the kernels in use, and plans.
#pragma once

#include <vector>

#include "conv.h"

namespace biper {

// What a product of two packed maps is, apart from the batch.
struct MatmulShape {
  int64_t rows;                // of pixels, in an image of both maps
  int64_t a_pixels, b_pixels;  // of a row
  int64_t channels, groups, low_a, low_b;
};

struct MatmulScale {
  float multiplier, row_multiplier, column_multiplier, bias;
};

// The plan of a product for so many images, all but its addresses. Throws std::invalid_argument
// where sizes do not fit.
MatmulPlan matmul_plan(const Kernels& kernels, const MatmulShape& shape, const MatmulScale& scale,
                       int64_t batch, int64_t threads);

// Multiplies two packed maps: integer sums where `sums` has memory, else scaled ones.
void matmul(int64_t batch, const MatmulShape& shape, const MatmulScale& scale,
            Span<const uint32_t> a, Span<const uint32_t> b, const FloatSpan& out,
            Span<int32_t> sums, int64_t threads);

// A linear layer of float32 rows with binary weights, kept re-laid in memory of its own. Calls from
// several threads are safe.
class SignLinear {
 public:
  // weight [O, words] canonical; multiplier [O]; bias and offset [O] or empty.
  SignLinear(int64_t inputs, int64_t outputs, Span<const uint32_t> weight,
             Span<const float> multiplier, Span<const float> bias, Span<const float> offset);

  // The plan of a call, all but its addresses.
  SignLinearPlan plan_for(int64_t rows, int64_t threads) const;

  void run(int64_t rows, Span<const float> x, Span<float> out, int64_t threads) const;

  const Kernels& kernels() const { return *kernels_; }
  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }

 private:
  const Kernels* kernels_;
  int64_t inputs_, outputs_;
  std::vector<uint32_t> weights_;
  std::vector<float> multiplier_, bias_, offset_;
};

}  // namespace biper
