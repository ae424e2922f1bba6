// Rows of floats times signs, without unpacking the signs.
//
// A table of five inputs has their 32 signed sums, so that five bits of a weight look one up: on
// AVX-512, a shift, a permutation and an addition do 80 multiply-adds. Others add the sums of three
// inputs, of which a table has 8, and of two. Vectors are outputs. A unit
// takes some rows through all chains of a chunk of outputs: it makes a chain's tables, adds the
// chain up for every block, and adds it to the block's totals.
#pragma once

#include "vectors.h"

namespace biper {

// Words of weights that are fetched ahead of the sums: 16 KB, four pages, since processors do not
// fetch across pages by themselves. Past the end nothing is read.
constexpr int64_t kWordsAhead = 4096;

constexpr int64_t kChainInputs = kChainWords * kSignWordInputs;

// Fills the tables of `words` words of a row from input `first` on; inputs that are missing are 0.
template <class I>
BIPER_INLINE void fill_tables(const float* x, int64_t first, int64_t inputs, int64_t words,
                              float* tables) {
  alignas(64) float padded[kChainInputs];
  const float* from = x + first;
  const int64_t left = inputs - first;
  if (left < words * kSignWordInputs) {
    __builtin_memset(padded, 0, sizeof padded);
    __builtin_memcpy(padded, from, static_cast<size_t>(left) * sizeof(float));
    from = padded;
  }
  for (int64_t t = 0; t < words * kWordTables; ++t) {
    I::make_table(from + kTableInputs * t, tables + t * I::kTableFloats);
  }
}

// The sum of a row with all signs +, in the order of the contract.
BIPER_INLINE float ordered_sum(const float* x, int64_t inputs) {
  float total = 0.0f;
  for (int64_t first = 0; first < inputs; first += kChainInputs) {
    float chain = 0.0f;
    const int64_t last = min64(inputs, first + kChainInputs);
    for (int64_t k = first; k < last; k += kTableInputs) {
      const auto at = [&](int64_t i) { return k + i < last ? x[k + i] : 0.0f; };
      chain += ((at(0) + at(1)) + at(2)) + (at(3) + at(4));
    }
    total += chain;
  }
  return total;
}

// Adds a chain of P rows to the totals of a block; `weights` are the block's words.
template <class I, int P>
static void add_chain(const uint32_t* weights, int64_t words, const float* tables,
                      int64_t table_step, float* totals, int64_t total_step) {
  constexpr int J = I::kSignVectors;
  typename I::Float sums[P * J];
  BIPER_UNROLL
  for (int i = 0; i < P * J; ++i) sums[i] = I::broadcast(0.0f);
  for (int64_t w = 0; w < words; ++w, weights += J * I::kFloats) {
    typename I::Signs signs[J];
    BIPER_UNROLL
    for (int j = 0; j < J; ++j) {
      signs[j] = I::load_signs(weights + j * I::kFloats);
      __builtin_prefetch(weights + kWordsAhead + j * I::kFloats);
    }
    for (int64_t t = 0; t < kWordTables; ++t, tables += I::kTableFloats) {
      BIPER_UNROLL
      for (int p = 0; p < P; ++p) {
        const typename I::Table table = I::load_table(tables + p * table_step);
        BIPER_UNROLL
        for (int j = 0; j < J; ++j) {
          sums[p * J + j] = I::add_look_up(sums[p * J + j], table, signs[j]);
        }
      }
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) signs[j] = I::next_signs(signs[j]);
    }
  }
  BIPER_UNROLL
  for (int p = 0; p < P; ++p) {
    BIPER_UNROLL
    for (int j = 0; j < J; ++j) {
      float* total = totals + p * total_step + j * I::kFloats;
      I::store(total, I::add(I::load(total), sums[p * J + j]));
    }
  }
}

template <class I, int P = I::kSignRows>
BIPER_INLINE void add_chain_of(int64_t rows, const uint32_t* weights, int64_t words,
                               const float* tables, int64_t table_step, float* totals,
                               int64_t total_step) {
  if (rows == P) {
    add_chain<I, P>(weights, words, tables, table_step, totals, total_step);
  } else if constexpr (P > 1) {
    add_chain_of<I, P - 1>(rows, weights, words, tables, table_step, totals, total_step);
  }
}

// Takes the totals of a row to its outputs [first, last).
template <class I>
BIPER_INLINE void finish_row(const SignLinearPlan& plan, const float* totals, int64_t row,
                             int64_t first, int64_t last) {
  using Float = typename I::Float;
  const Float sum =
      I::broadcast(plan.offset ? ordered_sum(plan.x + row * plan.inputs, plan.inputs) : 0.0f);
  for (int64_t o = first; o < last; o += I::kFloats) {
    Float base = I::load(plan.bias + o);
    if (plan.offset) base = I::fma(I::load(plan.offset + o), sum, base);
    const Float v = I::fma(I::load(plan.multiplier + o), I::load(totals + o - first), base);
    const int64_t index = row * plan.outputs + o, left = last - o;
    if (left >= I::kFloats) {
      I::store(plan.out + index, v);
    } else {
      store_stream<I, false>(plan.out, FloatType::kFloat32, index, left, v);
    }
  }
}

template <class I>
static void sign_linear_unit(const SignLinearPlan& plan, int64_t index, void* memory) {
  char* scratch = static_cast<char*>(memory);
  float* tables = reinterpret_cast<float*>(scratch + plan.scratch.tables);
  float* totals = reinterpret_cast<float*>(scratch + plan.scratch.totals);
  const int64_t first_row = index / plan.chunks * plan.group_rows;
  const int64_t rows = min64(plan.group_rows, plan.rows - first_row);
  const int64_t first_block = index % plan.chunks * plan.chunk_blocks;
  const int64_t blocks = min64(plan.chunk_blocks, plan.blocks - first_block);
  const int64_t table_step = kChainWords * kWordTables * I::kTableFloats;
  const int64_t total_step = plan.chunk_blocks * plan.lanes;
  __builtin_memset(totals, 0, static_cast<size_t>(rows * total_step) * sizeof(float));
  for (int64_t chain = 0; chain < plan.chains; ++chain) {
    const int64_t words = min64(kChainWords, plan.words - chain * kChainWords);
    for (int64_t r = 0; r < rows; ++r) {
      fill_tables<I>(plan.x + (first_row + r) * plan.inputs, chain * kChainInputs, plan.inputs,
                     words, tables + r * table_step);
    }
    const uint32_t* weights =
        plan.weights + (chain * kChainWords * plan.blocks + first_block * words) * plan.lanes;
    for (int64_t b = 0; b < blocks; ++b, weights += words * plan.lanes) {
      add_chain_of<I>(rows, weights, words, tables, table_step, totals + b * plan.lanes,
                      total_step);
    }
  }
  const int64_t first = first_block * plan.lanes;
  const int64_t last = min64(plan.outputs, first + blocks * plan.lanes);
  for (int64_t r = 0; r < rows; ++r) {
    finish_row<I>(plan, totals + r * total_step, first_row + r, first, last);
  }
}

}  // namespace biper
