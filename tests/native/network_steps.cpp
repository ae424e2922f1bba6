#include "network.h"

namespace biper {

int64_t numbers_of(Network& n, int64_t a, int64_t b) {
  const std::vector<const char*> functions[] = {
      {"abs",       "ceil",         "erf",        "exp",    "floor", "gelu",
       "gelu_tanh", "hard_sigmoid", "hard_swish", "log",    "log1p", "log_sigmoid",
       "mish",      "negative",     "reciprocal", "round",  "rsqrt", "sigmoid",
       "sign",      "silu",         "sqrt",       "square", "tanh",  "trunc"},
      {"add", "divide", "elu", "equal", "greater", "greater_equal", "maximum", "minimum",
       "multiply", "not_equal", "prelu", "softplus", "subtract"},
      {"add_product", "clamp", "where"}};
  Integers maps, lengths;
  const std::vector<float> constants = n.numbers.values(8, 1.0f);
  Values squared{{"function", std::string("square")}, {"sizes", Integers{21}}};
  squared["maps"] = Integers{a};
  squared["offsets"] = Integers{0};
  squared["strides"] = Integers{1};
  const int64_t squares = n.add("elementwise", squared)[0];
  for (size_t count = 1; count <= 3; ++count) {
    for (const char* function : functions[count - 1]) {
      // Processors differ in the bits of a NaN, which roots and logarithms of negative numbers are.
      const std::string name(function);
      const bool is_root = name.find("sqrt") != std::string::npos || name.rfind("log", 0) == 0;
      const Integers read(std::vector<int64_t>{is_root ? squares : a, b, kNoMap}), at{0, 0, 1};
      const Integers strides{1, 3, 1, 3, 0, 1};  // places in another order, a constant repeated
      Values values{{"function", std::string(function)}, {"sizes", Integers{3, 7}}};
      values["maps"] = Integers(read.begin(), read.begin() + static_cast<int64_t>(count));
      values["offsets"] = Integers(at.begin(), at.begin() + static_cast<int64_t>(count));
      values["strides"] =
          Integers(strides.begin(), strides.begin() + 2 * static_cast<int64_t>(count));
      if (count == 3) values["constants"] = memory(constants);
      maps.push_back(n.add("elementwise", values)[0]);
      lengths.push_back(21);
    }
  }
  for (const char* function :
       {"log_softmax", "normalize", "softmax", "log_sum_exp", "maximum", "mean", "minimum", "norm1",
        "norm2", "sum", "variance", "deviation"}) {
    maps.push_back(n.add("rows", {{"x", a},
                                  {"function", std::string(function)},
                                  {"length", int64_t{7}},
                                  {"epsilon", 1e-5}})[0]);
    lengths.push_back(n.program.shape(maps.back()).values());
  }
  return n.add("join", {{"maps", maps}, {"lengths", lengths}, {"count", int64_t{1}}})[0];
}

int64_t parts_of(Network& n, int64_t x, int64_t bits) {
  const std::vector<float> weight = n.numbers.values(9 * 70, 0.3f), bias = n.numbers.values(70, 1);
  const int64_t filtered =
      n.add("depthwise_conv", {{"x", x},
                               {"weight", memory(weight)},
                               {"bias", memory(bias)},
                               {"geometry", geometry(square(70, 70, 3, 1, 1, 70))}})[0];
  Integers places;  // [70, 20] of [20, 70], the first column of each beyond the map
  for (int64_t i = 0; i < 70; ++i) places.push_back(i);
  for (int64_t i = 0; i < 20; ++i) places.push_back(i == 0 ? -1 : i * 70);
  const int64_t turned = n.add(
      "rearrange", {{"x", x}, {"sizes", Integers{70, 20}}, {"places", places}, {"fill", 0.5}})[0];
  const int64_t product = n.add("matmul", {{"a", filtered},
                                           {"b", turned},
                                           {"count", int64_t{1}},
                                           {"rows", int64_t{20}},
                                           {"depth", int64_t{70}},
                                           {"columns", int64_t{20}}})[0];
  const int64_t adaptive = n.add("average", {{"x", x}, {"size", Integers{3, 3}}})[0];
  const int64_t signs = n.add("unbinarize", {{"bits", bits}})[0];
  const int64_t constant = n.add("constant", {{"values", memory(bias)}})[0];
  return n.add("join", {{"maps", Integers{filtered, product, adaptive, signs, constant}},
                        {"lengths", Integers{1400, 400, 630, n.program.shape(signs).values(), 70}},
                        {"count", int64_t{1}}})[0];
}

}  // namespace biper
