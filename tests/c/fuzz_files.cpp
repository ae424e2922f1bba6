// Loads the files whose names come on standard input, and runs those that load and are small.
//
// Says the name of each before it is loaded, so that the last one said is the one that ended the
// process, then what came of it. An alarm ends a call that hangs.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "biper.h"
#include "errors.h"
#include "file.h"
#include "program_section.h"

namespace {

constexpr unsigned kSeconds = 120;
constexpr int64_t kMostValues = 1 << 18;

// Whether one image needs no more memory than a run of a minute may touch.
bool is_small(const std::string& path) {
  const biper::File file = biper::open_file(path, biper::read_bytes(path));
  const biper::LoadedProgram loaded = biper::load_program(path, file);
  int64_t values = loaded.program->arena_bytes(1) / 4;
  for (const auto* forms : {&loaded.inputs, &loaded.outputs}) {
    for (const biper::TensorForm& form : *forms) {
      values += form.values < kMostValues ? form.values : kMostValues;
    }
  }
  return values < kMostValues;
}

std::vector<std::vector<float>> memory_for(const biper_model* model, int64_t batch, bool inputs) {
  const int64_t count = inputs ? biper_input_count(model) : biper_output_count(model);
  std::vector<std::vector<float>> made;
  for (int64_t i = 0; i < count; ++i) {
    biper_tensor tensor;
    inputs ? biper_input(model, i, &tensor) : biper_output(model, i, &tensor);
    made.emplace_back(static_cast<size_t>(batch * tensor.values));
    for (size_t v = 0; v < made.back().size(); ++v) {
      made.back()[v] = static_cast<float>(static_cast<int>(v * 7 % 33) - 16) / 4.0f;
    }
  }
  return made;
}

std::vector<biper_buffer> buffers_of(std::vector<std::vector<float>>& memory) {
  std::vector<biper_buffer> made;
  for (auto& values : memory) made.push_back({values.data(), static_cast<int64_t>(values.size())});
  return made;
}

biper_status run(const biper_model* model, int64_t batch) {
  auto from = memory_for(model, batch, true), to = memory_for(model, batch, false);
  const auto inputs = buffers_of(from), outputs = buffers_of(to);
  return biper_run(model, batch, inputs.data(), static_cast<int64_t>(inputs.size()), outputs.data(),
                   static_cast<int64_t>(outputs.size()));
}

const char* outcome(const std::string& path) {
  biper_options options = BIPER_OPTIONS;
  options.threads = 2;
  biper_model* model = nullptr;
  const biper_status status = biper_load(path.c_str(), &options, &model);
  if (status == BIPER_ERROR_INTERNAL) return "INTERNAL";
  if (status == BIPER_ERROR_NO_PROGRAM) return "no program";
  if (status != BIPER_OK) return *biper_error() != '\0' ? "refused" : "NO MESSAGE";
  const char* said = "too large to run";
  if (is_small(path)) {
    said = "runs";
    for (const int64_t batch : {1, 3}) {
      if (run(model, batch) != BIPER_OK) said = "refuses to run";
    }
    if (biper_has_preprocessing(model)) {
      const std::vector<uint8_t> pixels(9 * 7 * 3, 77);
      const biper_image image{pixels.data(), 9, 7, 3, 0};
      auto to = memory_for(model, 1, false);
      const auto outputs = buffers_of(to);
      biper_run_images(model, 1, &image, outputs.data(), static_cast<int64_t>(outputs.size()));
    }
  }
  biper_free(model);
  return said;
}

}  // namespace

int main() {
  std::string path;
  while (std::getline(std::cin, path)) {
    std::printf("%s\n", path.c_str());
    std::fflush(stdout);
    alarm(kSeconds);
    std::printf("= %s\n", outcome(path));
  }
  return 0;
}
