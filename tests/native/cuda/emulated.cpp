// Runs kernels in the emulator of CUDA: what test_cuda_emulator.py asks for.
//
// Words come from standard input and go to standard output as they are in memory; what the launch
// returned goes to standard error, and the exit status is 1 where that is an error.

#include "emulated.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "platform.cuh"

namespace {

using Words = std::vector<uint32_t>;

Words read_words() {
  Words words;
  uint32_t word;
  while (std::fread(&word, sizeof(word), 1, stdin) == 1) words.push_back(word);
  return words;
}

int write_words(const char* error, const Words& words) {
  if (error != nullptr) {
    std::fprintf(stderr, "%s\n", error);
    return 1;
  }
  return std::fwrite(words.data(), sizeof(uint32_t), words.size(), stdout) == words.size() ? 0 : 2;
}

// Each kernel is followed by a correct one, which must not suffer from what went before.
int run_wrong(const std::string& name) {
  const biper::Outcome outcome = biper::run_wrong_kernel(name);
  if (outcome.error != nullptr) {
    std::printf("error: %s\n", outcome.error);
  } else {
    std::printf("differ: %d\n", outcome.differ);
  }
  std::fflush(stdout);
  const biper::Outcome after = biper::run_wrong_kernel("correct");
  return after.error == nullptr && after.differ == 0 ? 0 : 1;
}

int run_product(int m, int n, int words) {
  const Words in = read_words();
  Words counts(size_t(m) * n);
  const uint32_t* const b = in.data() + size_t(m) * words;
  const char* const error =
      biper::count_common_bits(in.data(), b, reinterpret_cast<int*>(counts.data()), m, n, words);
  return write_words(error, counts);
}

int run_fragments(const std::string& instruction) {
  const Words in = read_words();
  const size_t count = in.size() / (32 * 10);
  const uint32_t* const b = in.data() + count * 32 * 4;
  const uint32_t* const d = b + count * 32 * 2;
  Words sums(d, d + count * 32 * 4);
  const char* const error =
      biper::multiply_fragments(instruction, in.data(), b, sums.data(), int(count));
  return write_words(error, sums);
}

int run_exchange() {
  const Words in = read_words();
  Words out(biper::kExchanges * 32);
  return write_words(biper::exchange(in.data(), out.data()), out);
}

int run_intrinsics() {
  const Words in = read_words();
  Words out(in.size() / 3 * biper::kIntrinsics);
  return write_words(biper::apply_intrinsics(in.data(), out.data(), int(in.size() / 3)), out);
}

int run_conversion(const std::string& name) {
  Words words = read_words();
  for (uint32_t& word : words) {
    const uint16_t bits = static_cast<uint16_t>(word);
    if (name == "half_to_float") word = __float_as_uint(biper::half_to_float(bits));
    if (name == "bfloat_to_float") word = __float_as_uint(biper::bfloat_to_float(bits));
    if (name == "float_to_half") word = biper::float_to_half(__uint_as_float(word));
    if (name == "float_to_bfloat") word = biper::float_to_bfloat(__uint_as_float(word));
  }
  return write_words(nullptr, words);
}

int run_order() {
  Words order(512);
  const char* const error = biper::order_of_threads(reinterpret_cast<int*>(order.data()));
  return write_words(error, order);
}

int run_launch(char** arguments) {
  unsigned grid[3];
  for (int i = 0; i < 3; ++i) grid[i] = unsigned(std::strtoul(arguments[i], nullptr, 10));
  const unsigned threads = unsigned(std::strtoul(arguments[3], nullptr, 10));
  const size_t shared_bytes = std::strtoul(arguments[4], nullptr, 10);
  return write_words(biper::launch_nothing(grid, threads, shared_bytes), {});
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  const std::string name = count > 2 ? arguments[2] : "";
  if (command == "wrong" && count == 3) return run_wrong(name);
  if (command == "product" && count == 5) {
    return run_product(std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4]));
  }
  if (command == "fragments" && count == 3) return run_fragments(name);
  if (command == "exchange") return run_exchange();
  if (command == "intrinsics") return run_intrinsics();
  if (command == "convert" && count == 3) return run_conversion(name);
  if (command == "order") return run_order();
  if (command == "launch" && count == 7) return run_launch(arguments + 2);
  std::fprintf(stderr, "emulated.cpp says what there is to run\n");
  return 2;
}
