// Launcher of the mean and linear layer: how images and classes are divided among blocks.
#include "pooled_linear.cuh"

namespace biper {
namespace {

using namespace linear;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <int TYPE, int WEIGHT, int VALUES, int IMAGES>
const char* launch_images(Params& p, cudaStream_t stream) {
  // Enough blocks for every multiprocessor of a large GPU; fewer read the map less often.
  constexpr int64_t kBlocks = 132;
  const PooledLinearArgs& a = p.args;
  p.vectors = a.c / VALUES;
  p.turns = p.vectors >= kThreads ? 1 : kThreads / p.vectors;
  if (p.turns > a.h * a.w) p.turns = a.h * a.w;
  const int64_t runs = ceil_divide(a.n, IMAGES);
  const int64_t slices = ceil_divide(kBlocks, runs);
  // Every warp gets classes, unless there are too few.
  constexpr int kLeast = kWarps * kClasses;
  p.slice = static_cast<int>(ceil_divide(ceil_divide(a.classes, slices), kLeast)) * kLeast;
  if (runs > (int64_t{1} << 31) - 1) return "the batch is too large for one launch";
  const size_t shared_bytes = sizeof(float) * (size_t{IMAGES} + p.turns) * a.c;
  if (shared_bytes > 64 * 1024) return "pooled_linear has too many channels for shared memory";
  const dim3 grid(static_cast<unsigned>(runs),
                  static_cast<unsigned>(ceil_divide(a.classes, p.slice)));
  return launch(pooled_linear_kernel<TYPE, WEIGHT, VALUES, IMAGES>, grid, kThreads, shared_bytes,
                stream, p);
}

template <int TYPE, int WEIGHT, int VALUES>
const char* launch_values(Params& p, cudaStream_t stream) {
  // The means of 8 images, if they leave room for the turns.
  if (p.args.n >= 64 && p.args.c <= 1024) {
    return launch_images<TYPE, WEIGHT, VALUES, 8>(p, stream);
  }
  return launch_images<TYPE, WEIGHT, VALUES, 1>(p, stream);
}

template <int TYPE, int WEIGHT>
const char* launch_types(Params& p, cudaStream_t stream) {
  constexpr int kValues = TYPE == kFloat32 ? 4 : 8;
  if (p.args.c % kValues == 0 && aligned(p.args.x) && aligned(p.args.weight)) {
    return launch_values<TYPE, WEIGHT, kValues>(p, stream);
  }
  return launch_images<TYPE, WEIGHT, 1, 1>(p, stream);
}

bool is_float(int type) { return type == kFloat32 || type == kFloat16 || type == kBfloat16; }

}  // namespace

const char* pooled_linear(const PooledLinearArgs& args, void* stream) {
  if (!is_float(args.type)) return "pooled_linear reads float32, float16 or bfloat16";
  const auto fits = [&](int type) { return type == args.type || type == kFloat32; };
  if (!fits(args.weight_type) || (args.bias && !fits(args.bias_type))) {
    return "weight and bias of pooled_linear must be float32 or of the map's type";
  }
  if (args.h < 1 || args.w < 1) return "pooled_linear has no mean of an empty image";
  if (args.n == 0 || args.classes == 0) return nullptr;
  Params p{};
  p.args = args;
  const cudaStream_t to = static_cast<cudaStream_t>(stream);
  if (args.type == kFloat32) return launch_types<kFloat32, kFloat32>(p, to);
  if (args.type == kFloat16) {
    if (args.weight_type == kFloat32) return launch_types<kFloat16, kFloat32>(p, to);
    return launch_types<kFloat16, kFloat16>(p, to);
  }
  if (args.weight_type == kFloat32) return launch_types<kBfloat16, kFloat32>(p, to);
  return launch_types<kBfloat16, kBfloat16>(p, to);
}

}  // namespace biper
