// The operators `biper::` for libtorch programs without Python, on the kernels of csrc/cpu.
//
// Link this into a program, and packages of AOTInductor that `biper export` wrote find their
// operators. The schemas are those of biper_engine/ops; a test compares them. Each call re-lays its
// weights, as nothing of a call is kept.
#include <torch/library.h>
#include <torch/torch.h>

#include <limits>
#include <map>
#include <string>
#include <vector>

#include "conv.h"
#include "maps.h"
#include "matmul.h"

namespace {

using at::Tensor;

constexpr int64_t kWordBits = 32;

int64_t words(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

// The arguments of a call by the names of its schema.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& arguments = op.schema().arguments();
    const auto values = torch::jit::pop(*stack, arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) values_[arguments[i].name()] = values[i];
  }

  const c10::IValue& operator[](const std::string& name) const { return values_.at(name); }
  Tensor tensor(const std::string& name) const {
    const c10::IValue& value = values_.count(name) ? values_.at(name) : none_;
    return value.isNone() ? Tensor() : value.toTensor();
  }
  int64_t integer(const std::string& name) const { return values_.at(name).toInt(); }
  std::vector<int64_t> integers(const std::string& name) const {
    return values_.at(name).toIntVector();
  }
  double number(const std::string& name, double otherwise) const {
    const c10::IValue& value = values_.at(name);
    return value.isNone() ? otherwise : value.toDouble();
  }
  at::ScalarType dtype() const {
    const c10::IValue& value = values_.at("dtype");
    return value.isNone() ? at::kFloat : value.toScalarType();
  }

 private:
  std::map<std::string, c10::IValue> values_;
  c10::IValue none_;
};

template <class T>
biper::Span<T> span(const Tensor& x) {
  using Element = std::remove_const_t<T>;
  if (!x.defined()) return {};
  const at::ScalarType wanted = std::is_same_v<Element, float>     ? at::kFloat
                                : std::is_same_v<Element, uint8_t> ? at::kBool
                                                                   : at::kInt;
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == wanted, "biper: wanted a CPU tensor of ",
              wanted, ", but got ", x.scalar_type(), " on ", x.device());
  return {static_cast<T*>(x.data_ptr()), x.numel()};
}

biper::FloatSpan float_span(const Tensor& x) {
  if (!x.defined()) return {};
  TORCH_CHECK(x.device().is_cpu(), "biper: wanted a CPU tensor, but got one on ", x.device());
  const biper::FloatType type = x.scalar_type() == at::kFloat      ? biper::FloatType::kFloat32
                                : x.scalar_type() == at::kHalf     ? biper::FloatType::kFloat16
                                : x.scalar_type() == at::kBFloat16 ? biper::FloatType::kBFloat16
                                                                   : biper::FloatType::kNone;
  TORCH_CHECK(type != biper::FloatType::kNone, "biper: wanted floats, but got ", x.scalar_type());
  return {x.data_ptr(), x.numel(), type};
}

Tensor dense(const Tensor& x) { return x.defined() ? x.contiguous() : x; }

Tensor channels_last(const Tensor& x) {
  return x.defined() ? x.contiguous(at::MemoryFormat::ChannelsLast) : x;
}

Tensor empty_map(int64_t n, int64_t c, int64_t h, int64_t w, at::ScalarType type) {
  return at::empty({n, h, w, c}, at::TensorOptions().dtype(type)).permute({0, 3, 1, 2});
}

Tensor empty_words(int64_t n, int64_t h, int64_t w, int64_t count) {
  return at::empty({n, h, w, count}, at::TensorOptions().dtype(at::kInt));
}

biper::ConvGeometry geometry(const Call& call, const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4, "biper: `weight` must be [O, KH, KW, words]");
  const auto stride = call.integers("stride"), padding = call.integers("padding");
  const auto dilation = call.integers("dilation");
  return {call.integer("in_channels"),
          weight.size(0),
          call.integer("groups"),
          weight.size(1),
          weight.size(2),
          stride.at(0),
          stride.at(1),
          padding.at(0),
          padding.at(1),
          padding.at(2),
          padding.at(3),
          dilation.at(0),
          dilation.at(1)};
}

Tensor prepack(const biper::ConvGeometry& geometry, const Tensor& weight) {
  const Tensor made = at::empty({biper::prepacked_words(geometry)}, at::kInt);
  biper::prepack(geometry, span<const uint32_t>(dense(weight)), span<uint32_t>(made));
  return made;
}

// -- maps -----------------------------------------------------------------------------------------

void binarize(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor x = channels_last(call.tensor("x"));
  const Tensor threshold = dense(call.tensor("threshold")), sense = dense(call.tensor("sense"));
  const Tensor bits = empty_words(x.size(0), x.size(2), x.size(3), words(x.size(1)));
  biper::binarize(x.size(0) * x.size(2) * x.size(3), x.size(1), float_span(x),
                  span<const float>(threshold), span<const uint8_t>(sense), span<uint32_t>(bits),
                  at::get_num_threads());
  torch::jit::push(*stack, bits);
}

void unbinarize(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor bits = dense(call.tensor("bits"));
  const int64_t channels = call.integer("channels");
  const Tensor x = empty_map(bits.size(0), channels, bits.size(1), bits.size(2), call.dtype());
  biper::unbinarize(bits.size(0) * bits.size(1) * bits.size(2), channels,
                    span<const uint32_t>(bits), float_span(x), at::get_num_threads());
  torch::jit::push(*stack, x);
}

void bmaxpool2d(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor bits = dense(call.tensor("bits")), take_and = dense(call.tensor("take_and"));
  const auto kernel = call.integers("kernel_size"), stride = call.integers("stride");
  const auto padding = call.integers("padding");
  const biper::Window pool{kernel.at(0), kernel.at(1),  stride.at(0),
                           stride.at(1), padding.at(0), padding.at(1)};
  biper::require_window(pool);
  const int64_t h = biper::window_positions("A pool", bits.size(1), pool.kernel_h, pool.stride_h,
                                            2 * pool.pad_h, 1);
  const int64_t w = biper::window_positions("A pool", bits.size(2), pool.kernel_w, pool.stride_w,
                                            2 * pool.pad_w, 1);
  const Tensor out = empty_words(bits.size(0), h, w, bits.size(3));
  biper::maxpool(bits.size(0), bits.size(1), bits.size(2), call.integer("channels"), pool,
                 span<const uint32_t>(bits), span<const uint8_t>(take_and), span<uint32_t>(out),
                 at::get_num_threads());
  torch::jit::push(*stack, out);
}

// -- convolutions ---------------------------------------------------------------------------------

void bconv2d(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor bits = dense(call.tensor("bits")), weight = call.tensor("weight");
  const biper::ConvGeometry shape = geometry(call, weight);
  const Tensor prepacked = prepack(shape, weight);
  const biper::Conv conv(shape, span<const uint32_t>(prepacked));
  const biper::ConvPlan plan = conv.plan_for(bits.size(0), bits.size(1), bits.size(2), true);
  const Tensor dots = empty_map(bits.size(0), shape.out_channels, plan.out_h, plan.out_w, at::kInt);
  conv.accumulate(bits.size(0), bits.size(1), bits.size(2), span<const uint32_t>(bits),
                  {static_cast<int32_t*>(dots.data_ptr()), dots.numel()}, at::get_num_threads());
  torch::jit::push(*stack, dots);
}

template <bool kFloats, bool kBits>
void fused(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Call call(op, stack);
  const Tensor bits = dense(call.tensor("bits")), weight = call.tensor("weight");
  const biper::ConvGeometry shape = geometry(call, weight);
  const Tensor prepacked = prepack(shape, weight);

  std::vector<Tensor> held;  // what the spans are of
  biper::EpilogueSpans epilogue;
  for (size_t i = 0; i < std::size(biper::kEpilogueVectors); ++i) {
    held.push_back(dense(call.tensor(biper::kEpilogueVectors[i].name)));
    epilogue.vectors[i] = span<const float>(held.back());
  }
  const Tensor sense = dense(call.tensor("sense")), pool_min = dense(call.tensor("pool_min"));
  epilogue.sense = span<const uint8_t>(sense);
  epilogue.pool_min = span<const uint8_t>(pool_min);
  epilogue.clamp_min = static_cast<float>(call.number("clamp_min", -kInfinity));
  epilogue.clamp_max = static_cast<float>(call.number("clamp_max", kInfinity));
  const auto kernel = call.integers("pool_kernel_size"), stride = call.integers("pool_stride");
  const auto padding = call.integers("pool_padding");
  const biper::Window pool{kernel.at(0), kernel.at(1),  stride.at(0),
                           stride.at(1), padding.at(0), padding.at(1)};
  const biper::Conv conv(shape, span<const uint32_t>(prepacked), pool, epilogue);

  const biper::ConvPlan plan = conv.plan_for(bits.size(0), bits.size(1), bits.size(2), false);
  const Tensor residual = channels_last(call.tensor("residual"));
  Tensor gate = call.tensor("gate");
  if (gate.defined()) gate = gate.to(at::kFloat).contiguous();
  const int64_t channels = shape.out_channels;
  Tensor floats, packed;
  if constexpr (kFloats) {
    floats = empty_map(bits.size(0), channels, plan.out_h, plan.out_w, call.dtype());
  }
  if constexpr (kBits) {
    packed = empty_words(bits.size(0), plan.out_h, plan.out_w, words(channels));
  }
  conv.run(
      {bits.size(0), bits.size(1), bits.size(2), span<const uint32_t>(bits), float_span(residual),
       float_span(floats), span<uint32_t>(packed), span<const float>(gate),
       gate.defined() ? gate.size(0) : 0, gate.defined() ? gate.size(1) : 0},
      at::get_num_threads());
  if constexpr (kFloats) torch::jit::push(*stack, floats);
  if constexpr (kBits) torch::jit::push(*stack, packed);
}

// -- matrices -------------------------------------------------------------------------------------

template <bool kScaled>
void bmatmul(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor a = dense(call.tensor("a")), b = dense(call.tensor("b"));
  const biper::MatmulShape shape{a.size(1),
                                 a.size(2),
                                 b.size(2),
                                 call.integer("channels"),
                                 call.integer("groups"),
                                 call.integer("low_a"),
                                 call.integer("low_b")};
  TORCH_CHECK(b.size(0) == a.size(0) && b.size(1) == a.size(1), "biper: maps do not fit");
  biper::MatmulScale scale{1.0f, 0.0f, 0.0f, 0.0f};
  at::ScalarType type = at::kInt;
  if constexpr (kScaled) {
    const auto factor = [&](const char* name) {
      return static_cast<float>(call.number(name, 0.0));
    };
    scale = {factor("multiplier"), factor("row_multiplier"), factor("column_multiplier"),
             factor("bias")};
    type = call.dtype();
  }
  const Tensor out =
      empty_map(a.size(0), shape.b_pixels, shape.rows * shape.groups, shape.a_pixels, type);
  biper::Span<int32_t> sums;
  if (!kScaled) sums = {static_cast<int32_t*>(out.data_ptr()), out.numel()};
  biper::matmul(a.size(0), shape, scale, span<const uint32_t>(a), span<const uint32_t>(b),
                kScaled ? float_span(out) : biper::FloatSpan{}, sums, at::get_num_threads());
  torch::jit::push(*stack, out);
}

void weight_linear(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor x = call.tensor("x"), weight = dense(call.tensor("weight"));
  const Tensor rows = x.to(at::kFloat).contiguous(), multiplier = dense(call.tensor("multiplier"));
  const Tensor bias = dense(call.tensor("bias")), offset = dense(call.tensor("offset"));
  auto sizes = rows.sizes().vec();
  const int64_t inputs = sizes.back();
  sizes.back() = weight.size(0);
  const Tensor out = at::empty(sizes, at::kFloat);
  const biper::SignLinear linear(inputs, weight.size(0), span<const uint32_t>(weight),
                                 span<const float>(multiplier), span<const float>(bias),
                                 span<const float>(offset));
  linear.run(inputs == 0 ? 0 : rows.numel() / inputs, span<const float>(rows), span<float>(out),
             at::get_num_threads());
  torch::jit::push(*stack, out.to(x.scalar_type()));
}

void unpack_weight(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Call call(op, stack);
  const Tensor weight = call.tensor("weight");
  TORCH_CHECK(weight.dim() == 4, "biper: `weight` must be [O, KH, KW, words]");
  const Tensor lanes = weight.unsqueeze(-1).bitwise_right_shift(at::arange(kWordBits, at::kInt));
  const Tensor flat = lanes.bitwise_and(1).flatten(3).slice(3, 0, call.integer("channels"));
  const auto one = [&](const char* name) {
    return call.tensor(name).to(call.dtype()).view({-1, 1, 1, 1});
  };
  const Tensor set = flat.permute({0, 3, 1, 2}).to(at::kBool);
  torch::jit::push(*stack, at::where(set, one("high"), one("low")).contiguous());
}

using Kernel = void(const c10::OperatorHandle&, torch::jit::Stack*);

template <Kernel* kKernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kKernel>();
}

}  // namespace

TORCH_LIBRARY(biper, m) {
#define BIPER_OPERATOR(name, schema) m.def(name schema);
#include "schemas.inc"
#undef BIPER_OPERATOR
}

TORCH_LIBRARY_IMPL(biper, CPU, m) {
  m.impl("binarize", boxed<&binarize>());
  m.impl("unbinarize", boxed<&unbinarize>());
  m.impl("bmaxpool2d", boxed<&bmaxpool2d>());
  m.impl("bconv2d", boxed<&bconv2d>());
  m.impl("bconv2d_float", boxed<&fused<true, false>>());
  m.impl("bconv2d_bits", boxed<&fused<false, true>>());
  m.impl("bconv2d_float_bits", boxed<&fused<true, true>>());
  m.impl("bmatmul", boxed<&bmatmul<false>>());
  m.impl("bmatmul_float", boxed<&bmatmul<true>>());
  m.impl("weight_linear", boxed<&weight_linear>());
  m.impl("unpack_weight", boxed<&unpack_weight>());
}
