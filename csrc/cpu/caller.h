// Calls of programs with tensors of PyTorch; see caller.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace biper {

// Adds the class Caller, and `use_torch`, which takes the module torch before there is a Caller.
void define_caller(pybind11::module_& m);

}  // namespace biper
