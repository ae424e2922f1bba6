// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace biper {

// Kernels of the chosen instruction set: the best that this processor has, or the one that
// BIPER_CPU_ISA named when they were first asked for, or that select_isa named since.
// Throws std::invalid_argument where BIPER_CPU_ISA names one that cannot run here.
const Kernels& kernels();

// Throws std::invalid_argument, naming those that can, where `name` cannot run here.
void select_isa(const std::string& name);

// Names of the instruction sets that run here, best first.
std::vector<std::string> usable_isas();

}  // namespace biper
