// Launchers of packed maps: the choice of a kernel by strides and alignment, and its grid.
#include "maps.cuh"

namespace biper {
namespace {

using namespace maps;

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kMostImages = 65535;  // limit of gridDim.y; kernels loop over the rest
constexpr const char* kTooLarge = "the map has too many pixels or channels for one launch";

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_float(int type) { return type == kFloat32 || type == kFloat16 || type == kBfloat16; }

// The number of pixels with which every thread of a block moves kMapVectors vectors.
int64_t block_pixels(int64_t pixel_vectors) {
  const int64_t wanted = int64_t{kMapThreads} * kMapVectors / pixel_vectors;
  return wanted < 1 ? 1 : wanted;
}

bool is_dense(const BinarizeArgs& a) {
  // A stride has no meaning if there is only one index.
  const int64_t pixels[] = {a.c, int64_t{a.w} * a.c, int64_t{a.h} * a.w * a.c};
  return (a.c == 1 || a.stride_c == 1) && (a.w == 1 || a.stride_w == pixels[0]) &&
         (a.h == 1 || a.stride_h == pixels[1]) && (a.n == 1 || a.stride_n == pixels[2]);
}

template <int TYPE>
const char* binarize_as(BinarizeParams& p, cudaStream_t stream) {
  const BinarizeArgs& a = p.args;
  constexpr int kValues = 16 / Stream<TYPE>::kBytes;
  if (is_dense(a) && a.c % kValues == 0 && aligned(a.x) && aligned(a.threshold) &&
      aligned(a.sense)) {
    const int64_t vectors = int64_t{p.words} * 32 / kValues;
    p.block_pixels = static_cast<int>(block_pixels(vectors));
    p.pixel_vectors = make_divisor(vectors);
    const int64_t blocks = ceil_divide(p.pixels, p.block_pixels);
    if (blocks > kMostBlocks) return kTooLarge;
    return launch(binarize_dense<TYPE>, dim3(static_cast<unsigned>(blocks)), kMapThreads, 0, stream,
                  p);
  }
  const int64_t plane = int64_t{a.h} * a.w;
  if (plane > kMostBlocks - kStridedThreads || p.words > kMostImages) return kTooLarge;
  p.width = make_divisor(a.w);
  const dim3 grid(static_cast<unsigned>(ceil_divide(plane, kStridedThreads)),
                  static_cast<unsigned>(a.n < kMostImages ? a.n : kMostImages),
                  static_cast<unsigned>(p.words));
  return launch(binarize_strided<TYPE>, grid, kStridedThreads, 0, stream, p);
}

template <int TYPE>
const char* unbinarize_as(UnbinarizeParams& p, cudaStream_t stream) {
  constexpr int kValues = 16 / Stream<TYPE>::kBytes;
  const bool whole = p.args.c % kValues == 0 && aligned(p.args.x);
  const int64_t vectors = whole ? p.args.c / kValues : p.args.c;
  p.block_pixels = static_cast<int>(block_pixels(vectors));
  p.pixel_vectors = make_divisor(vectors);
  const int64_t blocks = ceil_divide(p.pixels, p.block_pixels);
  if (blocks > kMostBlocks) return kTooLarge;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (whole) return launch(unbinarize_kernel<TYPE, kValues>, grid, kMapThreads, 0, stream, p);
  return launch(unbinarize_kernel<TYPE, 1>, grid, kMapThreads, 0, stream, p);
}

}  // namespace

const char* binarize(const BinarizeArgs& args, void* stream) {
  if (!is_float(args.type)) return "binarize reads float32, float16 or bfloat16";
  maps::BinarizeParams p{};
  p.args = args;
  p.pixels = args.n * args.h * args.w;
  p.words = static_cast<int>(ceil_divide(args.c, 32));
  if (p.pixels == 0 || p.words == 0) return nullptr;
  const cudaStream_t to = static_cast<cudaStream_t>(stream);
  if (args.type == kFloat32) return binarize_as<kFloat32>(p, to);
  if (args.type == kFloat16) return binarize_as<kFloat16>(p, to);
  return binarize_as<kBfloat16>(p, to);
}

const char* unbinarize(const UnbinarizeArgs& args, void* stream) {
  if (!is_float(args.type)) return "unbinarize writes float32, float16 or bfloat16";
  maps::UnbinarizeParams p{};
  p.args = args;
  p.pixels = args.n * args.h * args.w;
  p.words = static_cast<int>(ceil_divide(args.c, 32));
  if (p.pixels == 0 || p.words == 0) return nullptr;
  const cudaStream_t to = static_cast<cudaStream_t>(stream);
  if (args.type == kFloat32) return unbinarize_as<kFloat32>(p, to);
  if (args.type == kFloat16) return unbinarize_as<kFloat16>(p, to);
  return unbinarize_as<kBfloat16>(p, to);
}

const char* bmaxpool2d(const BitPoolArgs& args, void* stream) {
  maps::BitPoolParams p{};
  p.args = args;
  p.words = static_cast<int>(ceil_divide(args.c, 32));
  p.last_mask = ~0u >> (32 * p.words - args.c);
  const int64_t plane = int64_t{args.out_h} * args.out_w;
  if (args.n == 0 || plane == 0 || p.words == 0) return nullptr;
  const bool whole = p.words % 4 == 0 && aligned(args.bits) && aligned(args.out);
  const int64_t vectors = whole ? p.words / 4 : p.words;
  const size_t shared_bytes = args.take_and ? size_t{4} * p.words : 0;
  if (plane * vectors > kMostBlocks - maps::kPoolThreads || shared_bytes > 48 * 1024)
    return kTooLarge;
  p.pixel_vectors = make_divisor(vectors);
  p.out_width = make_divisor(args.out_w);
  const dim3 grid(static_cast<unsigned>(ceil_divide(plane * vectors, maps::kPoolThreads)),
                  static_cast<unsigned>(args.n < kMostImages ? args.n : kMostImages));
  const cudaStream_t to = static_cast<cudaStream_t>(stream);
  if (whole) return launch(maps::bit_pool_kernel<4>, grid, maps::kPoolThreads, shared_bytes, to, p);
  return launch(maps::bit_pool_kernel<1>, grid, maps::kPoolThreads, shared_bytes, to, p);
}

}  // namespace biper
