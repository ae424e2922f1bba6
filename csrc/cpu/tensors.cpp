#include "tensors.h"

#include "conv.h"

namespace py = pybind11;

namespace biper {
namespace {

constexpr uint32_t kMajor = 1;

const ExchangeApi* exchange_api(const py::object& type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  const void* found = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0) {
    found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  }
  const ExchangeApi* api = static_cast<const ExchangeApi*>(found);
  while (api != nullptr && api->major != kMajor) api = api->older;
  if (api == nullptr) {
    fail("PyTorch's tensors have no exchange API of DLPack 1.x: install torch 2.11 or later.");
  }
  return api;
}

// What compiled code of PyTorch asks a tensor's address by; a fifth of the time that a whole
// reading takes.
void* (*address_function())(PyObject*) {
  const char* const name = "_torchinductor_pyobject_tensor_data_ptr";
  py::object found = py::module_::import("torch").attr("_C");
  for (const char* const part : {"_dynamo", "guards", name}) {
    found = py::getattr(found, part, py::none());
  }
  if (PyLong_Check(found.ptr()) == 0) return nullptr;
  return reinterpret_cast<void* (*)(PyObject*)>(PyLong_AsVoidPtr(found.ptr()));
}

py::object name(const char* text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
}

}  // namespace

const Torch* torch = nullptr;

void use_torch(const py::module_& module) {
  const py::object type = module.attr("Tensor");
  const ExchangeApi* api = exchange_api(type);
  torch = new Torch{reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr()),
                    api,
                    module.attr("empty_like"),
                    name("requires_grad"),
                    name("is_neg"),
                    name("_version"),
                    address_function()};
}

bool read_any(PyObject* object, Tensor* tensor) {
  if (torch->api->read(object, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool read(PyObject* object, Tensor* tensor) {
  return Py_TYPE(object) == torch->tensor && read_any(object, tensor);
}

}  // namespace biper
