// Runs the CPU kernels without Python.
//
//     replay isa               prints the instruction set in use, then all that run here
//     replay cases FILE ISA    runs the cases of a file (see cases.py) and compares every byte
//     replay refusals ISA      makes calls that do not fit; each must be refused
//     replay programs ISA      runs whole networks in many ways and prints a hash of their bytes
//     replay cuts              cuts maps of many sizes for some threads; each must get its share
//
// Exits with 1 where a byte differs, a call is not refused or a cut unfair, with 2 where it cannot
// run.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <future>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"
#include "cuts.h"
#include "dispatch.h"
#include "maps.h"
#include "memory.h"
#include "programs.h"
#include "refusals.h"
#include "signed_conv.h"

namespace biper {
namespace {

struct Buffer {
  int64_t element_bytes;
  bool present;
  std::vector<uint8_t> contents;
};

struct Case {
  int64_t op;
  std::string name;
  std::vector<int64_t> values;
  size_t inputs;
  std::vector<Buffer> buffers;  // inputs, then expected outputs
};

// -- the file -------------------------------------------------------------------------------------

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }

  int64_t integer() {
    int64_t value = 0;
    file_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }

  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> memory(static_cast<size_t>(count));
    file_.read(reinterpret_cast<char*>(memory.data()), static_cast<std::streamsize>(count));
    return memory;
  }

 private:
  std::ifstream file_;
};

Case read_case(Reader& reader) {
  Case c;
  c.op = reader.integer();
  const std::vector<uint8_t> name = reader.bytes(reader.integer());
  c.name.assign(name.begin(), name.end());
  c.values.resize(static_cast<size_t>(reader.integer()));
  for (int64_t& value : c.values) value = reader.integer();
  c.inputs = static_cast<size_t>(reader.integer());
  c.buffers.resize(static_cast<size_t>(reader.integer()));
  for (Buffer& buffer : c.buffers) {
    buffer.element_bytes = reader.integer();
    const int64_t size = reader.integer();
    buffer.present = size >= 0;
    if (buffer.present) buffer.contents = reader.bytes(size);
  }
  return c;
}

std::vector<Case> read_cases(const char* path) {
  Reader reader(path);
  std::vector<Case> cases(static_cast<size_t>(reader.integer()));
  for (Case& c : cases) c = read_case(reader);
  return cases;
}

// -- one case -------------------------------------------------------------------------------------

// What a case is run with beside its operands. Operands that start an element late are aligned to
// elements and to nothing more.
struct Variant {
  int64_t threads;
  bool late;
  uint8_t garbage;  // that outputs hold before: 0xff makes floats NaN
};

constexpr Variant kVariants[] = {{1, false, 0xff}, {3, true, 0x5a}};

// A case's operands, each in memory of its own.
class Operands {
 public:
  Operands(const Case& c, const Variant& variant) : case_(c) {
    for (size_t i = 0; i < c.buffers.size(); ++i) {
      const Buffer& buffer = c.buffers[i];
      const int64_t shift = variant.late ? buffer.element_bytes : 0;
      const int64_t size = static_cast<int64_t>(buffer.contents.size());
      memory_.push_back(i < c.inputs ? Memory(buffer.contents, shift)
                                     : Memory(size, shift, variant.garbage));
    }
  }

  template <class T>
  Span<T> span(size_t i) {
    const Buffer& buffer = case_.buffers[i];
    if (!buffer.present) return {};
    return {reinterpret_cast<T*>(memory_[i].data()), memory_[i].size() / buffer.element_bytes};
  }

  FloatSpan floats(size_t i, int64_t type) {
    const Span<uint8_t> bytes = span<uint8_t>(i);
    return {bytes.data, bytes.size, static_cast<FloatType>(type)};
  }

  // The first difference from the expected outputs, if there is one.
  std::optional<std::string> difference() {
    for (size_t i = case_.inputs; i < memory_.size(); ++i) {
      const Buffer& wanted = case_.buffers[i];
      const uint8_t* got = memory_[i].data();
      for (size_t at = 0; at < wanted.contents.size(); ++at) {
        if (got[at] == wanted.contents[at]) continue;
        const size_t size = static_cast<size_t>(wanted.element_bytes);
        const size_t element = at / size;
        return "output " + std::to_string(i - case_.inputs) + ", element " +
               std::to_string(element) + ": got " + hex(got + element * size, size) + ", wanted " +
               hex(wanted.contents.data() + element * size, size);
      }
    }
    return std::nullopt;
  }

 private:
  static std::string hex(const uint8_t* bytes, size_t size) {
    std::string text = "0x";
    for (size_t i = size; i-- > 0;) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", bytes[i]);
      text += digits;
    }
    return text;
  }

  const Case& case_;
  std::vector<Memory> memory_;
};

ConvGeometry geometry_of(const int64_t* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]};
}

Window window_of(const int64_t* v) { return {v[0], v[1], v[2], v[3], v[4], v[5]}; }

Memory prepacked_of(const ConvGeometry& geometry, Span<const uint32_t> weight,
                    const Variant& variant) {
  const int64_t words = prepacked_words(geometry);
  Memory memory(4 * words, variant.late ? 4 : 0, variant.garbage);
  prepack(geometry, weight, {reinterpret_cast<uint32_t*>(memory.data()), words});
  return memory;
}

Span<const uint32_t> words_of(Memory& memory) {
  return {reinterpret_cast<const uint32_t*>(memory.data()), memory.size() / 4};
}

void run_accumulate(const int64_t* v, Operands& operands, const Variant& variant) {
  const ConvGeometry geometry = geometry_of(v);
  Memory prepacked = prepacked_of(geometry, operands.span<const uint32_t>(0), variant);
  const Conv conv(geometry, words_of(prepacked));
  conv.accumulate(v[13], v[14], v[15], operands.span<const uint32_t>(1), operands.span<int32_t>(2),
                  variant.threads);
}

void run_fused(const int64_t* v, Operands& operands, const Variant& variant) {
  const ConvGeometry geometry = geometry_of(v);
  Memory prepacked = prepacked_of(geometry, operands.span<const uint32_t>(0), variant);
  EpilogueSpans epilogue;
  size_t next = 2;
  for (Span<const float>& vector : epilogue.vectors) vector = operands.span<const float>(next++);
  epilogue.sense = operands.span<const uint8_t>(next++);
  epilogue.pool_min = operands.span<const uint8_t>(next++);
  const float* limits = operands.span<const float>(next++).data;
  epilogue.clamp_min = limits[0];
  epilogue.clamp_max = limits[1];
  const Conv conv(geometry, words_of(prepacked), window_of(v + 13), epilogue);
  Images images;
  images.batch = v[19];
  images.height = v[20];
  images.width = v[21];
  images.bits = operands.span<const uint32_t>(1);
  images.residual = operands.floats(next, v[22]);
  images.gate = operands.span<const float>(next + 1);
  images.gate_images = v[24];
  images.gate_channels = v[25];
  images.out_float = operands.floats(next + 2, v[23]);
  images.out_bits = operands.span<uint32_t>(next + 3);
  conv.run(images, variant.threads);
}

void run_signed(const int64_t* v, Operands& operands, const Variant& variant) {
  const Span<float> out = operands.span<float>(3);
  const bool on_bits = signed_conv(geometry_of(v), v[13], v[14], v[15],
                                   operands.span<const float>(0), operands.span<const float>(1),
                                   operands.span<const float>(2), out, variant.threads);
  if (on_bits != (v[16] == 1)) throw std::runtime_error("bits that say all, or don't");
  if (!on_bits) std::fill_n(out.data, out.size, 0.0f);
}

void run(const Case& c, Operands& operands, const Variant& variant) {
  const int64_t* v = c.values.data();
  switch (c.op) {
    case 0:
      return run_accumulate(v, operands, variant);
    case 1:
      return run_fused(v, operands, variant);
    case 2:
      return binarize(v[0], v[1], operands.floats(0, v[2]), operands.span<const float>(1),
                      operands.span<const uint8_t>(2), operands.span<uint32_t>(3), variant.threads);
    case 3:
      return unbinarize(v[0], v[1], operands.span<const uint32_t>(0), operands.floats(1, v[2]),
                        variant.threads);
    case 4:
      return maxpool(v[0], v[1], v[2], v[3], window_of(v + 4), operands.span<const uint32_t>(0),
                     operands.span<const uint8_t>(1), operands.span<uint32_t>(2), variant.threads);
    case 5:
      return run_signed(v, operands, variant);
    default:
      throw std::runtime_error("no operator " + std::to_string(c.op));
  }
}

// -- the commands ---------------------------------------------------------------------------------

int run_cases(const char* path, const std::string& isa) {
  const std::vector<Case> cases = read_cases(path);
  select_isa(isa);
  int64_t differing = 0;
  for (const Variant& variant : kVariants) {
    for (const Case& c : cases) {
      Operands operands(c, variant);
      // A new thread has no scratch from larger cases, in which an access beyond could hide.
      std::async(std::launch::async, [&] { run(c, operands, variant); }).get();
      const std::optional<std::string> difference = operands.difference();
      if (!difference) continue;
      if (differing++ == 0) {
        std::printf("%s, %d threads: %s: %s\n", isa.c_str(), static_cast<int>(variant.threads),
                    c.name.c_str(), difference->c_str());
      }
    }
  }
  const size_t runs = cases.size() * (sizeof kVariants / sizeof kVariants[0]);
  std::printf("%s: %zu cases, %zu runs, %lld differ\n", isa.c_str(), cases.size(), runs,
              static_cast<long long>(differing));
  return differing > 0 ? 1 : 0;
}

int run_refusals(const std::string& isa) {
  select_isa(isa);
  const Refusals made = refusals();
  for (const std::string& failure : made.failures) {
    std::printf("%s: %s\n", isa.c_str(), failure.c_str());
  }
  std::printf("%s: %lld calls, %zu not refused\n", isa.c_str(), static_cast<long long>(made.calls),
              made.failures.size());
  return made.failures.empty() ? 0 : 1;
}

int run_programs(const std::string& isa) {
  select_isa(isa);
  const ProgramRuns found = program_runs();
  for (const std::string& difference : found.differences) {
    std::printf("%s: %s differs\n", isa.c_str(), difference.c_str());
  }
  const std::vector<std::string> accepted = accepted_misfits();
  for (const std::string& name : accepted) {
    std::printf("%s: not refused: %s\n", isa.c_str(), name.c_str());
  }
  std::printf("%s: %lld runs, %zu differ, hash %016llx\n", isa.c_str(),
              static_cast<long long>(found.runs), found.differences.size(),
              static_cast<unsigned long long>(found.hash));
  return found.differences.empty() && accepted.empty() ? 0 : 1;
}

int print_isas() {
  std::printf("%s\n", kernels().name);
  for (const std::string& name : usable_isas()) std::printf("%s\n", name.c_str());
  return 0;
}

int run_cuts() {
  const Cuts found = cuts();
  std::printf("%lld cuts, %lld unfair\n", static_cast<long long>(found.tried),
              static_cast<long long>(found.unfair));
  return found.unfair == 0 ? 0 : 1;
}

int main_of(const std::vector<std::string>& arguments) {
  const std::string command = arguments.empty() ? "" : arguments[0];
  if (command == "isa" && arguments.size() == 1) return print_isas();
  if (command == "cases" && arguments.size() == 3) {
    return run_cases(arguments[1].c_str(), arguments[2]);
  }
  if (command == "refusals" && arguments.size() == 2) return run_refusals(arguments[1]);
  if (command == "programs" && arguments.size() == 2) return run_programs(arguments[1]);
  if (command == "cuts" && arguments.size() == 1) return run_cuts();
  std::fprintf(stderr, "usage: replay isa | cases FILE ISA | refusals ISA | programs ISA | cuts\n");
  return 2;
}

}  // namespace
}  // namespace biper

int main(int count, char** arguments) {
  try {
    return biper::main_of({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
