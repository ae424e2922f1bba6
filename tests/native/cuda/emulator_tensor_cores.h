// Products of the tensor cores, each for a whole warp at once.
//
// Lane l holds, with g = l / 4 and t = l % 4 and words of P elements (32 bits, 4 bytes, 2 halves):
// word i of A: row g + 8 * (i % 2), columns P * (t + 4 * (i / 2)) and on; word i of B: column g,
// rows P * (t + 4 * i) and on; element i of C and D: row g + 8 * (i / 2), column 2 * t + i % 2.

#pragma once

#include <cstdint>

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

// The words of a warp's operands as matrices: eight a row of A, eight a column of B.
struct Operands {
  uint32_t a[16][8];
  uint32_t b[8][8];  // [word][column]

  template <class Sum>
  explicit Operands(const Product<Sum>* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2;
      const int t = lane & 3;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = lanes[lane]->a[i];
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = lanes[lane]->b[i];
    }
  }
};

template <class Sum, class From>
void add_to_lanes(Product<Sum>* const* lanes, const From (&sums)[16][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2;
    const int t = lane & 3;
    for (int i = 0; i < 4; ++i) {
      lanes[lane]->d[i] += static_cast<Sum>(sums[g + 8 * (i >> 1)][2 * t + (i & 1)]);
    }
  }
}

// Set bits of each byte.
inline uint32_t byte_counts(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return (x + (x >> 4)) & 0x0f0f0f0fu;
}

struct BitProduct : Product<int> {
  static void run(BitProduct* const* operations, uint32_t) {
    Product<int>* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = operations[i];
    const Operands words(lanes);
    uint32_t sums[16][8];
    for (int row = 0; row < 16; ++row) {
      uint32_t counts[8] = {};  // four bytes each, at most 64
      for (int k = 0; k < 8; ++k) {
        const uint32_t a = words.a[row][k];
        for (int column = 0; column < 8; ++column) {
          counts[column] += byte_counts(a & words.b[k][column]);
        }
      }
      for (int column = 0; column < 8; ++column) {
        const uint32_t pairs = (counts[column] & 0xff00ffu) + (counts[column] >> 8 & 0xff00ffu);
        sums[row][column] = (pairs & 0xffffu) + (pairs >> 16);
      }
    }
    add_to_lanes(lanes, sums);
  }
};

// Elements of Format are ELEMENTS in a word. Sums in float32: of 32 products of bytes they are
// below 2 ** 21, so exact.
template <class Format>
struct ElementProduct : Product<typename Format::Sum> {
  using Sum = typename Format::Sum;

  static void run(ElementProduct* const* operations, uint32_t) {
    constexpr int elements = Format::kElements;
    Product<Sum>* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = operations[i];
    const Operands words(lanes);
    float a[16][8 * elements];
    float b[8 * elements][8];
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 8 * elements; ++k) {
        a[row][k] = Format::element(words.a[row][k / elements], k % elements);
      }
    }
    for (int k = 0; k < 8 * elements; ++k) {
      for (int column = 0; column < 8; ++column) {
        b[k][column] = Format::element(words.b[k / elements][column], k % elements);
      }
    }
    float sums[16][8];
    for (int row = 0; row < 16; ++row) {
      float row_sums[8] = {};
      for (int k = 0; k < 8 * elements; ++k) {
        for (int column = 0; column < 8; ++column) row_sums[column] += a[row][k] * b[k][column];
      }
      for (int column = 0; column < 8; ++column) sums[row][column] = row_sums[column];
    }
    add_to_lanes(lanes, sums);
  }
};

struct Bytes {
  using Sum = int;
  static constexpr int kElements = 4;
  static float element(uint32_t word, int i) {
    return static_cast<float>(static_cast<int>(word >> (8 * i) & 0xff));
  }
};

struct Halves {
  using Sum = float;
  static constexpr int kElements = 2;
  static float element(uint32_t word, int i) {
    return half_to_float(static_cast<uint16_t>(word >> (16 * i)));
  }
};

struct Bfloats {
  using Sum = float;
  static constexpr int kElements = 2;
  static float element(uint32_t word, int i) {
    return bfloat_to_float(static_cast<uint16_t>(word >> (16 * i)));
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
  using Operation = emulator::ElementProduct<emulator::Bytes>;
  emulator::multiply<Operation>(d, a, b, {"imma_u8", file, line});
}

// 16 products for each d[i].
inline void hmma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     BIPER_EMULATOR_SITE) {
  using Operation = emulator::ElementProduct<emulator::Halves>;
  emulator::multiply<Operation>(d, a, b, {"hmma_f16", file, line});
}

inline void hmma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      BIPER_EMULATOR_SITE) {
  using Operation = emulator::ElementProduct<emulator::Bfloats>;
  emulator::multiply<Operation>(d, a, b, {"hmma_bf16", file, line});
}

}  // namespace biper
