// The instruction sets in order of preference; the first that the processor has is used.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace biper {

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif
extern const Kernels kPortableKernels;

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vpopcntdq");
  found.push_back({&kAvx512Kernels, avx512});
  found.push_back({&kAvx2Kernels, avx2});
#endif
#if defined(__aarch64__)
  found.push_back({&kNeonKernels, true});
#endif
  found.push_back({&kPortableKernels, true});
  return found;
}

const Kernels& find(const std::string& name, const char* source) {
  std::string known, usable;
  for (const Candidate& candidate : candidates()) {
    if (candidate.kernels->name == name && candidate.supported) return *candidate.kernels;
    known += (known.empty() ? "" : ", ") + std::string(candidate.kernels->name);
    if (candidate.supported) {
      usable += (usable.empty() ? "" : ", ") + std::string(candidate.kernels->name);
    }
  }
  const bool is_known = (", " + known + ",").find(", " + name + ",") != std::string::npos;
  throw std::invalid_argument(std::string(source) + " (='" + name + "') " +
                              (is_known
                                   ? "names an instruction set that this processor lacks"
                                   : "names no instruction set of this build (" + known + ")") +
                              "; those that run here: " + usable + ".");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    const char* forced = std::getenv("BIPER_CPU_ISA");
    const bool is_forced = forced != nullptr && *forced != '\0';
    current = &find(is_forced ? forced : usable_isas().front(), "BIPER_CPU_ISA");
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

void select_isa(const std::string& name) {
  chosen.store(&find(name, "`name`"), std::memory_order_release);
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) names.push_back(candidate.kernels->name);
  }
  return names;
}

}  // namespace biper
