// The native program that a file holds; see biper_engine/runtime/program_section.py for its form.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "program.h"

namespace biper {

// A tensor that comes in or leaves as a map.
struct TensorForm {
  std::string name;
  std::vector<int64_t> sizes;  // for one image; the first one is multiplied by the batch
  bool packed = false;
  bool channels_last = false;  // whether the map has its values as [N, H, W, C]
  bool planar = false;         // whether the program also reads [N, C, H, W]

  int64_t values = 1;

  // Whether a tensor [N, C, H, W] must be turned before it is the map.
  bool is_turned() const { return channels_last && sizes[1] > 1 && sizes[2] * sizes[3] > 1; }
};

struct LoadedProgram {
  std::unique_ptr<const Program> program;
  std::vector<TensorForm> inputs, outputs;
};

// Makes the program of a file; `name` is what messages call it. Throws Error where there is none,
// and where it has any value that the steps refuse.
LoadedProgram load_program(const std::string& name, const File& file);

}  // namespace biper
