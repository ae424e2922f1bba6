// What the program of emulated.cpp runs. Each launch returns nullptr or the error of launch().

#pragma once

#include <cstdint>
#include <string>

namespace biper {

struct Outcome {
  const char* error;  // of the launch
  int differ;         // how many of the results are wrong
};

// -- wrong_kernels.cu -----------------------------------------------------------------------------

Outcome run_wrong_kernel(const std::string& name);

// -- right_kernels.cu -----------------------------------------------------------------------------

// [m, n] counts of the bits that rows of a [m, words] and b [n, words] have in common.
const char* count_common_bits(const uint32_t* a, const uint32_t* b, int* counts, int m, int n,
                              int words);

// Products of `count` warps: a [count, 32, 4], b [count, 32, 2] and d [count, 32, 4] words, as the
// lanes hold them; d is read, too. `instruction` is the name of the function in platform.cuh.
const char* multiply_fragments(const std::string& instruction, const uint32_t* a, const uint32_t* b,
                               uint32_t* d, int count);

// The values of kExchanges exchanges of a warp whose lane i has values[i]: [kExchanges, 32].
constexpr int kExchanges = 12;
const char* exchange(const uint32_t* values, uint32_t* results);

// Intrinsics of two words and a third, for each of `count`: [count, kIntrinsics].
constexpr int kIntrinsics = 9;
const char* apply_intrinsics(const uint32_t* words, uint32_t* results, int count);

// The threads of two blocks of 256 in the order in which they come to the same place.
const char* order_of_threads(int* order);

const char* launch_nothing(const unsigned (&grid)[3], unsigned threads, size_t shared_bytes);

}  // namespace biper
