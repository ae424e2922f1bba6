// Products of the tensor cores, each for a whole warp at once.
//
// Lane l holds, with g = l / 4 and t = l % 4 and words of P elements (32 bits, 4 bytes, 2 halves):
// word i of A: row g + 8 * (i % 2), columns P * (t + 4 * (i / 2)) and on; word i of B: column g,
// rows P * (t + 4 * i) and on; element i of C and D: row g + 8 * (i / 2), column 2 * t + i % 2.

#pragma once

#include <cstdint>
#include <type_traits>

#include "emulator_floats.h"
#include "emulator_schedule.h"
#include "emulator_warp.h"

namespace biper {
namespace emulator {

template <class Sum>
struct Product {
  Sum* d;
  const uint32_t* a;
  const uint32_t* b;
};

// One register of eight or several of fewer, as the processor has them.
typedef uint32_t Words8 __attribute__((vector_size(32), may_alias));
typedef int32_t Ints8 __attribute__((vector_size(32), may_alias));
typedef float Floats8 __attribute__((vector_size(32), may_alias));

// The words of a warp's operands as matrices.
struct Operands {
  alignas(32) uint32_t a[16][8];  // [row][word]
  alignas(32) uint32_t b[8][8];   // [word][column]

  template <class Operation>
  explicit Operands(Operation* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2;
      const int t = lane & 3;
      const uint32_t* from = lanes[lane]->a;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = from[i];
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = lanes[lane]->b[i];
    }
  }

  const Words8& row_of_a(int row) const { return *reinterpret_cast<const Words8*>(a[row]); }
  const Words8& word_of_b(int word) const { return *reinterpret_cast<const Words8*>(b[word]); }
};

template <class Operation, class Row>
void add_to_lanes(Operation* const* lanes, const Row (&sums)[16]) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      auto& d = lanes[4 * (row & 7) + (column >> 1)]->d[2 * (row >> 3) + (column & 1)];
      d += static_cast<std::remove_reference_t<decltype(d)>>(sums[row][column]);
    }
  }
}

struct BitProduct : Product<int> {
  static void run(BitProduct* const* lanes, uint32_t) {
    const Operands words(lanes);
    Words8 sums[16];
    for (int row = 0; row < 16; ++row) {
      Words8 counts = {};  // of each byte, at most 64
      for (int k = 0; k < 8; ++k) {
        Words8 x = words.word_of_b(k) & words.a[row][k];
        x -= x >> 1 & 0x55555555u;
        x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
        counts += (x + (x >> 4)) & 0x0f0f0f0fu;
      }
      counts = (counts & 0xff00ffu) + (counts >> 8 & 0xff00ffu);
      sums[row] = (counts & 0xffffu) + (counts >> 16);
    }
    add_to_lanes(lanes, sums);
  }
};

// Words of Format::kElements numbers. Sums in float32: of 32 products of bytes they are below
// 2 ** 21, so exact.
template <class Format>
struct NumberProduct : Product<typename Format::Sum> {
  static void run(NumberProduct* const* lanes, uint32_t) {
    constexpr int kElements = Format::kElements;
    const Operands words(lanes);
    Floats8 b[kElements][8];
    for (int i = 0; i < kElements; ++i) {
      for (int k = 0; k < 8; ++k) Format::unpack(words.word_of_b(k), i, b[i][k]);
    }
    Floats8 sums[16];
    for (int row = 0; row < 16; row += 2) {
      Floats8 first = {};
      Floats8 second = {};
      for (int i = 0; i < kElements; ++i) {
        Floats8 a[2];
        Format::unpack(words.row_of_a(row), i, a[0]);
        Format::unpack(words.row_of_a(row + 1), i, a[1]);
        for (int k = 0; k < 8; ++k) {
          first += b[i][k] * a[0][k];
          second += b[i][k] * a[1][k];
        }
      }
      sums[row] = first;
      sums[row + 1] = second;
    }
    add_to_lanes(lanes, sums);
  }
};

struct Bytes {
  using Sum = int;
  static constexpr int kElements = 4;
  static void unpack(const Words8& words, int i, Floats8& numbers) {
    const Words8 bytes = words >> (8 * i) & 0xffu;
    numbers = __builtin_convertvector((Ints8)bytes, Floats8);
  }
};

struct Halves {
  using Sum = float;
  static constexpr int kElements = 2;
  static void unpack(const Words8& words, int i, Floats8& numbers) {
    const Words8 halves = words >> (16 * i) & 0xffffu;
    const Words8 magnitudes = halves & 0x7fffu;  // from here as in half_to_float
    const Floats8 scaled = (Floats8)(magnitudes << 13) * 0x1p112f;
    const Words8 special = (Words8)(magnitudes >= 0x7c00u) & 0x7f800000u;
    numbers = (Floats8)((Words8)scaled | special | (halves & 0x8000u) << 16);
  }
};

struct Bfloats {
  using Sum = float;
  static constexpr int kElements = 2;
  static void unpack(const Words8& words, int i, Floats8& numbers) {
    numbers = (Floats8)(i == 0 ? words << 16 : words & 0xffff0000u);
  }
};

template <class Operation, class Sum>
void multiply(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
  Operation operation;
  operation.d = d;
  operation.a = a;
  operation.b = b;
  collect(operation, ~0u, true, site);
}

}  // namespace emulator

// d[i] += popc(a & b) over 256 bits.
inline void bmma_and_popc(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          BIPER_EMULATOR_SITE) {
  emulator::multiply<emulator::BitProduct>(d, a, b, {"bmma_and_popc", file, line});
}

// Unsigned bytes, 32 products for each d[i].
inline void imma_u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    BIPER_EMULATOR_SITE) {
  using Operation = emulator::NumberProduct<emulator::Bytes>;
  emulator::multiply<Operation>(d, a, b, {"imma_u8", file, line});
}

// 16 products for each d[i].
inline void hmma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     BIPER_EMULATOR_SITE) {
  using Operation = emulator::NumberProduct<emulator::Halves>;
  emulator::multiply<Operation>(d, a, b, {"hmma_f16", file, line});
}

inline void hmma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      BIPER_EMULATOR_SITE) {
  using Operation = emulator::NumberProduct<emulator::Bfloats>;
  emulator::multiply<Operation>(d, a, b, {"hmma_bf16", file, line});
}

}  // namespace biper
