// Launchers of the stem: the choice of a kernel by shape, and the tiles of images.
#include <algorithm>

#include "device.h"
#include "stem.h"
#include "stem_strips.cuh"
#include "stem_tiles.cuh"

namespace biper {
namespace {

using namespace stems;

constexpr int64_t kMostTiles = (int64_t{1} << 31) - 1;
constexpr const char* kTooLarge = "the stem has too many tiles or channels for one launch";

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// This is enough for a tile, and leaves room for several blocks.
constexpr int kSharedBytes = 76 * 1024;

bool is_identity_pool(const StemArgs& a) {
  return a.pool_kernel_h == 1 && a.pool_kernel_w == 1 && a.pool_stride_h == 1 &&
         a.pool_stride_w == 1 && a.pool_padding_h == 0 && a.pool_padding_w == 0;
}

// C' of stem.h.
int pixel_values(const StemArgs& a) { return a.c * a.stride_x % 2 ? a.c + 1 : a.c; }

// -- strips --------------------------------------------------------------------------------------
// -----------------------------------------------------------------------------------------

template <class S>
bool fits(const StemArgs& a) {
  const bool pool =
      a.pool_kernel_h == 3 && a.pool_kernel_w == 3 && a.pool_stride_h == 2 && a.pool_stride_w == 2;
  return a.kernel_h == S::kKernel && a.kernel_w == S::kKernel && a.stride_y == S::kStride &&
         a.stride_x == S::kStride && pixel_values(a) == S::kValues &&
         (S::kPool ? pool : is_identity_pool(a));
}

template <class S>
const char* launch_strips(const StemArgs& a, cudaStream_t stream) {
  // If the batch is small, two blocks for every multiprocessor of a large GPU.
  constexpr int64_t kBlocks = 264;
  // If there are many tiles, a block computes several with the same weights.
  constexpr int64_t kManyBlocks = 4096, kMostSteps = 4;
  StripParams p{};
  p.args = a;
  const int64_t groups = ceil_divide(a.o, kGroup);
  p.block_groups = groups > 1 ? 2 : 1;
  const int64_t group_blocks = ceil_divide(groups, p.block_groups);
  const int64_t tiles_x = ceil_divide(a.out_w, S::kStrips * S::kColumns);
  p.segment_rows = 8;
  while (p.segment_rows > 1 &&
         a.n * ceil_divide(a.out_h, p.segment_rows) * tiles_x * group_blocks < kBlocks) {
    p.segment_rows /= 2;
  }
  const int64_t tiles_y = ceil_divide(a.out_h, p.segment_rows);
  const int64_t tiles = a.n * tiles_y * tiles_x;
  if (tiles > kMostTiles / 2 || group_blocks > 65535) return kTooLarge;
  p.tiles = static_cast<uint32_t>(tiles);
  p.tiles_x = make_divisor(tiles_x);
  p.tiles_y = make_divisor(tiles_y);
  p.patch_rows = (conv_rows(S::kPool, p.segment_rows) - 1) * S::kStride + S::kKernel;
  int64_t steps = tiles * group_blocks / kManyBlocks;
  steps = steps < 1 ? 1 : steps > kMostSteps ? kMostSteps : steps;
  const dim3 grid(static_cast<unsigned>(ceil_divide(tiles, steps)),
                  static_cast<unsigned>(group_blocks));
  const unsigned threads = 32 * S::kStrips * p.block_groups;
  const size_t shared_bytes =
      sizeof(float) *
      (kScaleFloats + kChannelArrays * p.block_groups * kGroup + size_t(p.patch_rows) * S::kPitch);
  if (a.compute == kFloat16) {
    return launch(strip_kernel<S, kFloat16>, grid, threads, shared_bytes, stream, p);
  }
  return launch(strip_kernel<S, kBfloat16>, grid, threads, shared_bytes, stream, p);
}

// -- tiles ---------------------------------------------------------------------------------------
// ------------------------------------------------------------------------------------------

int64_t tile_bytes(const TileParams& p) {
  const int64_t conv = p.pooled ? int64_t{p.conv_tile_h} * p.conv_tile_w * kConvPitch : 0;
  return 4 * (kScaleFloats + kChannelArrays * kGroup + p.weight_floats + conv +
              int64_t{p.patch_h} * p.pitch);
}

// Fill in the parameters that depend on the tile.
void set_tile(TileParams& p, int tile_h, int tile_w) {
  const StemArgs& a = p.args;
  p.tile_h = tile_h, p.tile_w = tile_w;
  p.conv_tile_h = (tile_h - 1) * a.pool_stride_h + a.pool_kernel_h;
  p.conv_tile_w = (tile_w - 1) * a.pool_stride_w + a.pool_kernel_w;
  p.patch_h = (p.conv_tile_h - 1) * a.stride_y + a.kernel_h;
  if (a.tensor_cores) {
    p.column_words = a.stride_x * p.values / 2;
    p.pitch = (p.conv_tile_w - 1) * p.column_words + 4 * p.runs;
    p.patch_columns = static_cast<int>(ceil_divide(2 * int64_t{p.pitch}, p.values));
  } else {
    p.column_words = a.stride_x * p.values;
    p.patch_columns = (p.conv_tile_w - 1) * a.stride_x + a.kernel_w;
    p.pitch = p.patch_columns * p.values;
  }
}

template <int COMPUTE>
const char* launch_tiles(const TileParams& p, dim3 grid, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(tile_bytes(p));
  if constexpr (COMPUTE != kFloat32) {
    if (p.args.tensor_cores) {
      return launch(tile_kernel<COMPUTE, true>, grid, kThreads, bytes, stream, p);
    }
  }
  return launch(tile_kernel<COMPUTE, false>, grid, kThreads, bytes, stream, p);
}

const char* stem_tiles(const StemArgs& a, const DeviceProperties& device, cudaStream_t stream) {
  TileParams p{};
  p.args = a;
  p.pooled = !is_identity_pool(a);
  p.values = a.tensor_cores ? pixel_values(a) : a.c;
  p.runs = static_cast<int>(ceil_divide(int64_t{a.kernel_w} * p.values, 8));
  p.steps = static_cast<int>(ceil_divide(int64_t{a.kernel_h} * p.runs, 2));
  p.weight_floats = a.tensor_cores ? 0 : a.kernel_h * a.kernel_w * a.c * kGroup;
  // Two passes over the 15 * 17 pixels under a tile of a 3x3 pool at stride 2, or one pass.
  set_tile(p, 8, p.pooled ? 7 : 16);
  const int64_t room = std::min(device.shared_bytes, kSharedBytes);
  while (tile_bytes(p) > room && p.tile_h * p.tile_w > 1) {
    if (p.tile_h >= p.tile_w) {
      set_tile(p, p.tile_h / 2, p.tile_w);
    } else {
      set_tile(p, p.tile_h, p.tile_w / 2);
    }
  }
  if (tile_bytes(p) > room) {
    return "the windows of the stem do not fit into the shared memory of a block";
  }
  const int64_t tiles_x = ceil_divide(a.out_w, p.tile_w), tiles_y = ceil_divide(a.out_h, p.tile_h);
  const int64_t tiles = a.n * tiles_y * tiles_x, groups = ceil_divide(a.o, kGroup);
  if (tiles > kMostTiles || groups > 65535) return kTooLarge;
  p.tile_width = make_divisor(p.tile_w);
  p.conv_tile_width = make_divisor(p.conv_tile_w);
  p.patch_width = make_divisor(p.patch_columns);
  p.tiles_x = make_divisor(tiles_x);
  p.tiles_y = make_divisor(tiles_y);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(groups));
  if (a.compute == kFloat32) return launch_tiles<kFloat32>(p, grid, stream);
  if (a.compute == kFloat16) return launch_tiles<kFloat16>(p, grid, stream);
  return launch_tiles<kBfloat16>(p, grid, stream);
}

}  // namespace

bool stem_has_tensor_cores(int compute) {
  DeviceProperties device;
  return compute != kFloat32 && current_device(&device) == nullptr && device.has_half_mma;
}

const char* stem(const StemArgs& args, void* stream) {
  if (args.type < kFloat32 || args.type > kUint8) return "unknown type of the image";
  if (args.compute < kFloat32 || args.compute > kBfloat16) return "unknown type to compute in";
  if (args.c < 1 || args.c > 4) return "the stem reads 1 to 4 channels";
  if ((args.h - 1) * args.stride_h + (args.w - 1) * args.stride_w + (args.c - 1) * args.stride_c >
      kMostTiles) {
    return "an image of the stem spans 2^31 elements or more";
  }
  if (args.n == 0 || args.o == 0 || args.out_h == 0 || args.out_w == 0) return nullptr;
  DeviceProperties device;
  if (const char* error = current_device(&device)) return error;
  const cudaStream_t to = static_cast<cudaStream_t>(stream);
  if (args.tensor_cores) {
    if (args.compute == kFloat32) return "tensor cores do not multiply float32 exactly";
    if (!device.has_half_mma) return "float16 tensor cores need compute capability 8.0 or later";
    using Imagenet = Strips<7, 2, 3, true, 3>;
    using Large = Strips<7, 2, 3, false, 3>;
    using Small = Strips<3, 1, 4, false, 5>;
    using Halving = Strips<3, 2, 3, false, 5>;
    if (fits<Imagenet>(args)) return launch_strips<Imagenet>(args, to);
    if (fits<Large>(args)) return launch_strips<Large>(args, to);
    if (fits<Small>(args)) return launch_strips<Small>(args, to);
    if (fits<Halving>(args)) return launch_strips<Halving>(args, to);
  }
  return stem_tiles(args, device, to);
}

}  // namespace biper
