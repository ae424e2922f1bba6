// Checks the operands of sign_gradient and cuts its work into samples.
#include "sign_gradient.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr int64_t kMostThreads = (int64_t{1} << 31) - 1;
// Values of work, some 10 us, below which waking another thread costs more than it brings.
constexpr int64_t kValuesPerUnit = int64_t{1} << 15;

struct Context {
  const SignGradientCall* call;
  void (*run)(const SignGradientCall&, int64_t, int64_t);
  int64_t samples, step;
};

void run_unit(const void* memory, int64_t unit, void*) {
  const Context* c = static_cast<const Context*>(memory);
  c->run(*c->call, unit * c->step, std::min(c->samples, (unit + 1) * c->step));
}

}  // namespace

void sign_gradient(int64_t samples, int64_t length, int32_t surrogate, double epsilon,
                   Span<const float> x, Span<const float> gradient, Span<float> out,
                   int64_t threads) {
  require_range("surrogate", surrogate, 0, static_cast<int64_t>(Surrogate::kIdentity));
  require_range("threads", threads, 1, kMostThreads);
  const int64_t count = checked_product("The map", {samples, length});
  require_memory("x", x.data, x.size, count, 4);
  require_memory("gradient", gradient.data, gradient.size, count, 4);
  require_memory("out", out.data, out.size, count, 4);
  if (count == 0) return;
  const SignGradientCall call{
      static_cast<Surrogate>(surrogate), length, epsilon, x.data, gradient.data, out.data};
  const int64_t step = std::max<int64_t>(1, kValuesPerUnit / length);
  const Context context{&call, kernels().sign_gradient, samples, step};
  run_job({run_unit, &context, (samples + step - 1) / step, 0}, threads);
}

}  // namespace biper
