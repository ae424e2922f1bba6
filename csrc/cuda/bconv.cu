// The division of a binary convolution into blocks, and the choice of its path.

#include <algorithm>
#include <climits>
#include <set>
#include <utility>

#include "bconv.h"
#include "bconv_cut.cuh"
#include "bconv_popcount.cuh"
#include "device.h"

namespace biper {
namespace {

constexpr int kMaxClasses = 96;  // rectangles of valid taps in a block's table
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr unsigned kMostBlocks = 65535;  // along y and z
constexpr int kRoomForTwo = 100000;  // bytes of shared memory with which two blocks fit on an SM

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int words_of(int channels) { return (channels + 31) / 32; }

uint32_t mask_of_last(int channels) {
  return channels % 32 == 0 ? 0xffffffffu : (1u << channels % 32) - 1u;
}

// Taps outside of the image along an axis: the most at its start and at its end, and all pairs of
// these numbers that occur.
struct Outside {
  int start = 0, cut = 0;
  std::set<std::pair<int, int>> pairs;
};

Outside taps_outside(int outputs, int size, int kernel, int stride, int pad, int dilation) {
  Outside outside;
  for (int i = 0; i < outputs; ++i) {
    const int begin = i * stride - pad;
    const int first = std::min(kernel, begin < 0 ? (-begin + dilation - 1) / dilation : 0);
    const int inside = size > begin ? (size - begin + dilation - 1) / dilation : 0;
    const int end = std::max(first, std::min(kernel, inside));
    outside.start = std::max(outside.start, first);
    outside.cut = std::max(outside.cut, kernel - end);
    outside.pairs.emplace(first, kernel - end);
  }
  return outside;
}

// Whether a block can compute the pool: its windows tile the map, and are 4 neighbouring rows.
bool tiles(const Window& pool) {
  const int window = pool.kernel_h * pool.kernel_w;
  return (window == 1 || window == 4) && pool.stride_h == pool.kernel_h &&
         pool.stride_w == pool.kernel_w && pool.pad_top == 0 && pool.pad_left == 0;
}

bool aligned(const void* memory, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
}

// Fill in the table of rectangles of valid taps; false if there are too many of them.
bool find_rectangles(BconvMmaParams* p) {
  const ConvShape& s = p->shape;
  const Outside rows = taps_outside(s.conv_h, s.height, s.conv.kernel_h, s.conv.stride_h,
                                    s.conv.pad_top, s.conv.dilation_h);
  const Outside columns = taps_outside(s.conv_w, s.width, s.conv.kernel_w, s.conv.stride_w,
                                       s.conv.pad_left, s.conv.dilation_w);
  const int64_t classes =
      int64_t{rows.start + 1} * (rows.cut + 1) * (columns.start + 1) * (columns.cut + 1);
  if (classes > kMaxClasses || s.conv.kernel_h > 255 || s.conv.kernel_w > 255) return false;
  p->rows_cut = rows.cut;
  p->columns_start = columns.start;
  p->columns_cut = columns.cut;
  p->classes = static_cast<int>(classes);
  for (const auto& [top, below] : rows.pairs) {
    for (const auto& [left, beyond] : columns.pairs) {
      const int index =
          ((top * (rows.cut + 1) + below) * (columns.start + 1) + left) * (columns.cut + 1) +
          beyond;
      uint8_t* const rectangle = p->rectangles[index];
      rectangle[0] = static_cast<uint8_t>(top);
      rectangle[1] = static_cast<uint8_t>(s.conv.kernel_h - below);
      rectangle[2] = static_cast<uint8_t>(left);
      rectangle[3] = static_cast<uint8_t>(s.conv.kernel_w - beyond);
    }
  }
  return true;
}

// Fill in the parameters that do not depend on the tile; false if no tile can run the call.
bool common_params(const ConvArgs& args, BconvMmaParams* params) {
  const ConvShape& s = args.shape;
  BconvMmaParams& p = *params;
  p = BconvMmaParams();
  p.shape = s;
  p.epilogue = args.epilogue;
  p.outputs = args.outputs;
  p.bits = args.bits;
  p.fragments = args.weights.fragments;
  p.sums = args.weights.sums;
  p.in_words = words_of(s.in_channels);
  p.last_mask = mask_of_last(s.in_channels);
  const int taps = s.conv.kernel_h * s.conv.kernel_w;
  p.chunk_words = fragment_words(s.in_channels, taps);
  p.chunks = (p.in_words + p.chunk_words - 1) / p.chunk_words;
  p.patches = p.chunks > 1 ? 2 : 1;
  p.steps = (taps * p.chunk_words / 2 + 3) / 4;
  p.stage_steps = std::min(p.steps, 8);
  p.stage_buffers = p.steps * p.chunks > p.stage_steps ? 2 : 1;
  // 8 words of each of four neighbouring pixels are in the 32 banks of one access of half a warp.
  p.pixel_words = p.chunk_words < 8 ? p.chunk_words : round_up(p.chunk_words - 8, 16) + 8;
  p.copy_words = p.in_words % 4 == 0 && p.chunk_words % 4 == 0 && aligned(args.bits, 16) ? 4
                 : p.in_words % 2 == 0 && aligned(args.bits, 8)                          ? 2
                                                                                         : 1;
  p.out_h = make_divisor(s.out_h);
  p.window_w = make_divisor(s.pool.kernel_w);
  p.dilation_h = make_divisor(s.conv.dilation_h);
  p.dilation_w = make_divisor(s.conv.dilation_w);
  p.copies = make_divisor(p.chunk_words / p.copy_words);
  p.image_rows = make_divisor((s.out_h * s.pool.kernel_h - 1) * s.conv.stride_h +
                              (s.conv.kernel_h - 1) * s.conv.dilation_h + 1);
  p.window_shift = s.pool.kernel_h * s.pool.kernel_w == 4 ? 2 : 0;
  return find_rectangles(params);
}

// The outputs; kRagged unless eight channels are aligned to 16 bytes in all maps, of one type.
Leaving leaving(const ConvArgs& args) {
  const ConvOutputs& out = args.outputs;
  const bool whole =
      args.shape.out_channels % kLane == 0 && aligned(out.residual, 16) && aligned(out.floats, 16);
  if (!whole || out.dots != nullptr) return kRagged;  // dots are for tests and for verification
  if (args.epilogue.first != nullptr) return kLimits;
  const int type = out.floats != nullptr ? out.float_type : out.residual_type;
  if (out.residual != nullptr && out.residual_type != type) return kRagged;
  return type == kFloat16 ? kFloat16Stream : type == kBfloat16 ? kBfloat16Stream : kFloat32Stream;
}

// Divide the call into tiles of one size, `width` output columns wide. False if they are too large.
bool cut_tiles(const BconvMmaParams& common, int tile, int width, int shared_bytes, Cut* cut) {
  const TileSize size = kTiles[tile];
  BconvMmaParams& p = cut->params = common;
  const ConvShape& s = p.shape;
  p.tile_width = make_divisor(width);
  p.patch_width = (width * s.pool.kernel_w - 1) * s.conv.stride_w +
                  (s.conv.kernel_w - 1) * s.conv.dilation_w + 1;
  const int64_t all_rows = int64_t{s.batch} * s.out_h;
  p.units = static_cast<int>(all_rows * width);
  const int tile_units = size.rows >> p.window_shift;
  // A tile of consecutive units may start anywhere in a row, and its rows anywhere in an image.
  const int64_t rows = std::min<int64_t>(all_rows, (tile_units + width - 2) / width + 1);
  const int64_t images = std::min<int64_t>(s.batch, (rows + s.out_h - 2) / s.out_h + 1);
  const int reach = (s.conv.kernel_h - 1) * s.conv.dilation_h + 1;
  const int64_t patch_rows =
      rows * s.pool.kernel_h * s.conv.stride_h + images * std::max(0, reach - s.conv.stride_h);
  const int64_t patch_words = patch_rows * p.patch_width * p.pixel_words;
  if (patch_words > shared_bytes) return false;
  p.patch_words = round_up(static_cast<int>(patch_words), 4);
  cut->tile = tile;
  cut->grid = dim3(static_cast<unsigned>((p.units + tile_units - 1) / tile_units),
                   static_cast<unsigned>((s.out_channels + size.columns - 1) / size.columns),
                   static_cast<unsigned>((s.out_w + width - 1) / width));
  const int blocks = size.columns / kBlock;
  cut->shared_bytes =
      4 * (static_cast<size_t>(p.patches) * p.patch_words +
           static_cast<size_t>(p.stage_buffers) * p.stage_steps * blocks * kFragmentWords +
           static_cast<size_t>(8) * p.steps + (kSharedVectors + 2) * size.columns + 3 * size.rows +
           static_cast<size_t>(p.classes) * size.columns);
  return cut->shared_bytes <= static_cast<size_t>(shared_bytes) && cut->grid.y <= kMostBlocks &&
         cut->grid.z <= kMostBlocks;
}

// Choose the width of the tiles: the output's, if that fits.
bool cut_width(const BconvMmaParams& common, int tile, int shared_bytes, Cut* cut) {
  const int width = common.shape.out_w;
  if (cut_tiles(common, tile, width, shared_bytes, cut)) return true;
  for (const int narrower : {64, 16}) {
    if (narrower < width && cut_tiles(common, tile, narrower, shared_bytes, cut)) return true;
  }
  return false;
}

// Choose the tile. A larger tile shares more of patch and weights, if no processor is left idle.
bool cut_call(const ConvArgs& args, const DeviceProperties& device, Cut* cut) {
  BconvMmaParams common;
  if (!common_params(args, &common)) return false;
  cut->leaving = leaving(args);
  const int processors = args.processors > 0 ? args.processors : device.processors;
  bool found = false;
  for (const int shared_bytes : {std::min(kRoomForTwo, device.shared_bytes), device.shared_bytes}) {
    for (int tile = cut->leaving == kRagged ? kRaggedTile : 0; tile < kTileCount; ++tile) {
      Cut candidate;
      if (!cut_width(common, tile, shared_bytes, &candidate)) continue;
      candidate.leaving = cut->leaving;
      *cut = candidate;
      found = true;
      const int64_t blocks = int64_t{cut->grid.x} * cut->grid.y * cut->grid.z;
      if (blocks >= 2 * processors) return true;
    }
    if (found) return true;
  }
  return false;
}

const char* launch_popcount(const ConvArgs& args, const DeviceProperties& device,
                            cudaStream_t stream) {
  const ConvShape& s = args.shape;
  BconvPopcountParams p = {};
  p.shape = s;
  p.epilogue = args.epilogue;
  p.outputs = args.outputs;
  p.bits = args.bits;
  p.words = args.weights.words;
  p.in_words = words_of(s.in_channels);
  p.group_channels = s.in_channels / s.groups;
  p.group_words = words_of(p.group_channels);
  p.last_mask = mask_of_last(p.group_channels);
  p.pixels = static_cast<uint32_t>(s.batch) * s.out_h * s.out_w;
  const int64_t blocks =
      (static_cast<int64_t>(p.pixels) + kPopcountThreads / 32 - 1) / (kPopcountThreads / 32);
  const int64_t most = static_cast<int64_t>(device.processors) * 64;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, most)),
                  static_cast<unsigned>(words_of(s.out_channels)));
  return launch(bconv_popcount, grid, kPopcountThreads, 0, stream, p);
}

int64_t type_bytes(int type) { return type == kFloat32 ? 4 : type == kNone ? 0 : 2; }

template <class T>
T* moved(T* memory, int64_t elements) {
  return memory == nullptr ? nullptr : memory + elements;
}

// Run the first half of a batch, then the rest.
const char* run_halves(const ConvArgs& args, int64_t pixels, void* stream) {
  ConvArgs part = args;
  part.shape.batch = args.shape.batch / 2;
  if (const char* error = bconv2d(part, stream)) return error;
  const ConvShape& s = args.shape;
  const int64_t images = part.shape.batch;
  const int64_t values = images * pixels * s.out_channels;
  ConvOutputs& out = part.outputs;
  part.bits += images * s.height * s.width * words_of(s.in_channels);
  out.residual =
      moved(static_cast<const char*>(out.residual), values * type_bytes(out.residual_type));
  out.floats = moved(static_cast<char*>(out.floats), values * type_bytes(out.float_type));
  out.bits = moved(out.bits, images * pixels * words_of(s.out_channels));
  out.dots = moved(out.dots, values);
  part.shape.batch = s.batch - part.shape.batch;
  return bconv2d(part, stream);
}

// Return the path, and its cut if it uses tensor cores; -1 if there is none.
int choose(const ConvArgs& args, const DeviceProperties& device, Cut* cut) {
  const ConvShape& s = args.shape;
  const bool fits = s.groups == 1 && args.weights.fragments != nullptr &&
                    aligned(args.weights.fragments, 16) && tiles(s.pool) &&
                    cut_call(args, device, cut);
  const bool bits = fits && device.has_binary_mma;
  const bool bytes = fits && device.has_byte_mma;
  switch (args.path) {
    case kBinaryTensorCores:
      return bits ? kBinaryTensorCores : -1;
    case kByteTensorCores:
      return bytes ? kByteTensorCores : -1;
    case kPopcount:
      return kPopcount;
    default:
      return bits ? kBinaryTensorCores : bytes ? kByteTensorCores : kPopcount;
  }
}

}  // namespace

int fragment_words(int in_channels, int taps) {
  const int most = taps == 1 ? 64 : 16;
  const int words = round_up(words_of(in_channels), 2);
  if (words <= most) return words;
  const int chunks = (words + most - 1) / most;
  return round_up((words + chunks - 1) / chunks, 4);
}

const char* bconv2d_way(const ConvArgs& args, ConvWay* way) {
  DeviceProperties device;
  if (const char* error = current_device(&device)) return error;
  Cut cut;
  *way = {};
  way->path = choose(args, device, &cut);
  if (way->path != kBinaryTensorCores && way->path != kByteTensorCores) return nullptr;
  way->rows = kTiles[cut.tile].rows;
  way->columns = kTiles[cut.tile].columns;
  way->width = static_cast<int>(cut.params.tile_width.divisor);
  way->chunks = cut.params.chunks;
  way->ragged = cut.leaving == kRagged;
  way->shared_bytes = static_cast<int>(cut.shared_bytes);
  return nullptr;
}

const char* bconv2d(const ConvArgs& args, void* stream) {
  const ConvShape& s = args.shape;
  if (s.batch == 0) return nullptr;
  // Kernels count output pixels, including the padding of the last tile, in 32 bits.
  const int64_t pixels = static_cast<int64_t>(s.out_h) * s.out_w;
  if (s.batch * pixels > kMostPixels) {
    if (s.batch == 1) return "an image of the output has more than 2^30 pixels";
    return run_halves(args, pixels, stream);
  }
  DeviceProperties device;
  if (const char* error = current_device(&device)) return error;
  Cut cut;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (choose(args, device, &cut)) {
    case kBinaryTensorCores:
      return launch_bits(cut, on);
    case kByteTensorCores:
      return launch_bytes(cut, on);
    case kPopcount:
      return launch_popcount(args, device, on);
    default:
      return "the path that was asked for cannot run this convolution";
  }
}

}  // namespace biper
