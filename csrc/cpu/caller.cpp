// A program called with tensors of PyTorch, in a single call from Python.
//
// Small networks run for some tens of microseconds, in which their maps and weights push Python out
// of the caches: then every question about a tensor costs some tenths of a microsecond, and making
// one three. So a call asks once for all that a tensor is.
#include "caller.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "conv.h"
#include "program.h"
#include "tensors.h"
#include "watch.h"

namespace py = pybind11;

namespace biper {
namespace {

bool is_contiguous(const Tensor& x) {
  int64_t stride = 1;
  bool in_order = true;
  for (int32_t d = x.dimensions; d-- > 0;) {
    if (x.shape[d] == 0) return true;  // whatever the strides are, there is nothing
    in_order = in_order && (x.shape[d] == 1 || x.strides[d] == stride);
    stride *= x.shape[d];
  }
  return in_order;
}

bool is_channels_last(const Tensor& x) {
  return x.dimensions == 4 && lies_in_order<4>(x, {0, 2, 3, 1});
}

// What the tensor of a map is.
struct Form {
  int64_t rows;                // of the first dimension, for each image
  std::vector<int64_t> image;  // sizes behind the first dimension
  bool packed;                 // int32 or int64, else float32
  bool wide;                   // int64
  bool contiguous;             // does
  bool channels_last;          // does

  int64_t batch(const Tensor& x) const { return x.shape[0] / rows; }

  // Returns whether `x` is that, with a batch of any size.
  bool fits(const Tensor& x) const {
    if (x.device_type != kCpuDevice || x.type != (packed ? kIntType : kFloatType) ||
        x.bits != (wide ? 64 : 32) || x.lanes != 1 ||
        x.dimensions != static_cast<int32_t>(image.size()) + 1) {
      return false;
    }
    for (size_t d = 0; d < image.size(); ++d) {
      if (x.shape[d + 1] != image[d]) return false;
    }
    if (x.shape[0] % rows != 0) return false;
    return (contiguous && is_contiguous(x)) || (channels_last && is_channels_last(x));
  }
};

MapMemory map_memory(const Tensor& x, bool planar) {
  int64_t values = x.bits / 32;
  for (int32_t d = 0; d < x.dimensions; ++d) values *= x.shape[d];
  return {x.start(), values, planar};
}

// Whether the values are in memory that kernels can read. Those of tensors with a negative bit are
// not: what lies there has the other sign.
bool has_plain_memory(PyObject* tensor, const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.start());
  if ((address == 0 && x.shape[0] != 0) || address % (x.bits / 8) != 0) return false;
  const auto negative =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->is_neg.ptr()));
  if (!negative) throw py::error_already_set();
  return negative.ptr() == Py_False;
}

bool requires_grad(PyObject* tensor) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch->requires_grad.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

// Makes the tensors of an output. They are like the first one of their batch, which is kept without
// its memory: torch.empty_like reads one argument, torch.empty four, in 2 and 4 us on a Zen 4 whose
// caches the network has taken.
class Result {
 public:
  Result(Form form, py::function empty) : form_(std::move(form)), empty_(std::move(empty)) {}

  // Returns a new tensor for so many images and sets `memory` to what it has.
  py::object make(int64_t batch, Tensor* memory) {
    py::object like = like_;
    if (batch != batch_) {
      like = empty_(batch);
      check(like, batch, memory);
      like.attr("untyped_storage")().attr("resize_")(0);
      // Other threads run in the calls above, and where the old tensor goes, after all is set.
      py::object old = like;
      std::swap(old, like_);
      batch_ = batch;
    }
    const auto made =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch->empty_like.ptr(), like.ptr()));
    if (!made) throw py::error_already_set();
    check(made, batch, memory);
    return made;
  }

 private:
  // A mode, a transform or a patch of torch may make another tensor than it was asked for.
  void check(const py::object& made, int64_t batch, Tensor* memory) const {
    if (read(made.ptr(), memory) && form_.fits(*memory) && form_.batch(*memory) == batch) return;
    fail(
        "torch.empty made another tensor for an output than it was asked for: call the engine "
        "outside of what changes it, such as a mode of PyTorch or a transform of torch.func.");
  }

  Form form_;
  py::function empty_;  // returns a tensor for so many images
  py::object like_;
  int64_t batch_ = -1;
};

using FormValues = std::tuple<int64_t, std::vector<int64_t>, bool, bool, bool, bool>;

Form form(const FormValues& values) {
  const auto& [rows, image, packed, wide, contiguous, channels_last] = values;
  if (rows < 1) fail("A tensor has at least one row for each image.");
  return {rows, image, packed, wide, contiguous, channels_last};
}

class Caller {
 public:
  Caller(std::shared_ptr<const Program> program, const std::vector<FormValues>& sources,
         const std::vector<std::pair<FormValues, py::function>>& results)
      : program_(std::move(program)) {
    for (const FormValues& values : sources) sources_.push_back(form(values));
    for (const auto& [values, empty] : results) results_.emplace_back(form(values), empty);
  }

  // Returns the outputs as a tuple of new tensors; None, with nothing done, where an input is not
  // as its map wants it, or requires grad, or where `watch`, unless null, does not hold. Also
  // appends to `seconds`, unless that is null, when each step was done.
  py::object call(const py::tuple& inputs, int64_t threads, const Watch* watch,
                  std::vector<double>* seconds) {
    if (inputs.size() != sources_.size() || inputs.empty()) return py::none();
    if (watch != nullptr && !watch->holds()) return py::none();
    std::vector<MapMemory> from, to;
    from.reserve(sources_.size());
    to.reserve(results_.size());
    int64_t batch = 0;
    for (size_t i = 0; i < sources_.size(); ++i) {
      Tensor x;
      PyObject* object = PyTuple_GET_ITEM(inputs.ptr(), static_cast<Py_ssize_t>(i));
      if (!read(object, &x) || !sources_[i].fits(x)) return py::none();
      if (i > 0 && sources_[i].batch(x) != batch) return py::none();
      if (requires_grad(object) || !has_plain_memory(object, x)) return py::none();
      batch = sources_[i].batch(x);
      const bool planar = sources_[i].channels_last && sources_[i].contiguous && is_contiguous(x);
      from.push_back(map_memory(x, planar));
    }
    py::tuple outputs(results_.size());
    for (size_t i = 0; i < results_.size(); ++i) {
      Tensor out;
      py::object made = results_[i].make(batch, &out);
      to.push_back(map_memory(out, false));
      PyTuple_SET_ITEM(outputs.ptr(), static_cast<Py_ssize_t>(i), made.release().ptr());
    }
    {
      py::gil_scoped_release release;
      program_->run(batch, from, to, threads, seconds);
    }
    return outputs;
  }

 private:
  std::shared_ptr<const Program> program_;
  std::vector<Form> sources_;
  std::vector<Result> results_;
};

}  // namespace

void define_caller(py::module_& m) {
  define_watch(m);
  m.def("use_torch", &use_torch);
  py::class_<Caller>(m, "Caller")
      .def(py::init<std::shared_ptr<const Program>, const std::vector<FormValues>&,
                    const std::vector<std::pair<FormValues, py::function>>&>(),
           py::arg("program"), py::kw_only(), py::arg("sources"), py::arg("results"))
      .def("call", [](Caller& caller, const py::tuple& inputs, int64_t threads,
                      const Watch* watch) { return caller.call(inputs, threads, watch, nullptr); })
      .def("timed", [](Caller& caller, const py::tuple& inputs, int64_t threads) {
        std::vector<double> seconds;
        const py::object outputs = caller.call(inputs, threads, nullptr, &seconds);
        return std::pair<py::object, std::vector<double>>(outputs, seconds);
      });
}

}  // namespace biper
