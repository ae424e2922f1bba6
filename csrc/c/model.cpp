// The functions of biper.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "biper.h"
#include "errors.h"
#include "file.h"
#include "images.h"
#include "program_section.h"
#include "thread_pool.h"

#define BIPER_TEXT_(x) #x
#define BIPER_TEXT(x) BIPER_TEXT_(x)

using biper::Json;
using biper::TensorForm;

struct biper_model {
  biper::LoadedProgram loaded;
  std::vector<std::string> classes;
  std::optional<biper::Preprocessing> preprocessing;
  std::string no_preprocessing;  // why there is none
  int64_t threads = 1;
};

namespace biper {
namespace {

constexpr int64_t kMostThreads = 1024;

thread_local std::string last_error;  // of this thread

biper_status failed(biper_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return status;
}

// Runs the body of a function of biper.h, from which no exception may leave.
template <class Body>
biper_status guarded(const Body& body) noexcept {
  try {
    body();
    return BIPER_OK;
  } catch (const Error& error) {
    return failed(error.status(), error.what());
  } catch (const std::invalid_argument& error) {
    return failed(BIPER_ERROR_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return failed(BIPER_ERROR_MEMORY, "There is not enough memory.");
  } catch (const std::length_error&) {
    return failed(BIPER_ERROR_MEMORY, "There is not enough memory.");
  } catch (const std::exception& error) {
    return failed(BIPER_ERROR_INTERNAL, error.what());
  }
}

void require_pointer(const char* name, const void* pointer) {
  if (pointer == nullptr) fail("`" + std::string(name) + "` is null.");
}

// -- loading --------------------------------------------------------------------------------------

// Threads of a call: what the option says, else BIPER_NUM_THREADS, else all processors.
int64_t threads_of(const biper_options* options) {
  int64_t threads = 0;
  if (options != nullptr) {
    if (options->size < sizeof(biper_options)) {
      fail("`options` has a wrong size: begin with `biper_options options = BIPER_OPTIONS;`.");
    }
    threads = options->threads;
    require_range("threads", threads, 0, kMostThreads);
  }
  const char* said = std::getenv("BIPER_NUM_THREADS");
  if (threads == 0 && said != nullptr && *said != '\0') {
    char* end = nullptr;
    threads = std::strtoll(said, &end, 10);
    if (*end != '\0' || threads < 1 || threads > kMostThreads) {
      fail("BIPER_NUM_THREADS (='" + std::string(said).substr(0, 40) +
           "') must be an integer from 1 to 1024.");
    }
  }
  return threads != 0 ? threads : std::clamp<int64_t>(processors(), 1, kMostThreads);
}

void take_metadata(const Json& header, biper_model& model) {
  model.no_preprocessing = "The file has no preprocessing.";
  const Json* metadata = header.find("metadata");
  if (metadata == nullptr || !metadata->is(Json::Kind::kObject)) return;
  if (const Json* names = metadata->find("class_names"); names != nullptr) {
    for (const Json& name : names->items) model.classes.push_back(name.text);
  }
  try {
    Preprocessing how = preprocessing_of(*metadata);
    const std::vector<TensorForm>& inputs = model.loaded.inputs;
    const std::vector<int64_t> wanted{1, how.channels, how.height, how.width};
    if (inputs.size() == 1 && !inputs[0].packed && inputs[0].sizes == wanted) {
      model.preprocessing = std::move(how);
    } else {
      model.no_preprocessing =
          "The file's preprocessing makes another input than the network takes.";
    }
  } catch (const std::invalid_argument& error) {
    model.no_preprocessing = std::string("The file has no whole preprocessing: ") + error.what();
  }
}

void load(const std::string& name, Bytes bytes, const biper_options* options, biper_model** to) {
  auto model = std::make_unique<biper_model>();
  model->threads = threads_of(options);
  const File file = open_file(name, std::move(bytes));
  model->loaded = load_program(name, file);
  take_metadata(file.header, *model);
  *to = model.release();
}

// -- calls ----------------------------------------------------------------------------------------

void describe(const std::vector<TensorForm>& forms, int64_t index, biper_tensor* tensor) {
  require_pointer("tensor", tensor);
  require_range("index", index, 0, static_cast<int64_t>(forms.size()) - 1);
  const TensorForm& form = forms[static_cast<size_t>(index)];
  *tensor = {};
  tensor->name = form.name.c_str();
  tensor->type = form.packed ? BIPER_BITS32 : BIPER_FLOAT32;
  tensor->rank = static_cast<int32_t>(form.sizes.size());
  std::copy(form.sizes.begin(), form.sizes.end(), tensor->sizes);
  tensor->values = form.values;
}

// Turns images [C, P] into [P, C] where `rows` is C, and back where it is P.
void turn(const float* from, int64_t images, int64_t rows, int64_t columns, float* to) {
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    }
    from += rows * columns;
    to += rows * columns;
  }
}

// The memory of a call's maps: the caller's, or some of ours from or to which values are turned.
class CallMemory {
 public:
  CallMemory(const std::vector<TensorForm>& forms, int64_t batch) : forms_(forms), batch_(batch) {}

  void take(const char* what, const biper_buffer* buffers, int64_t count, bool planar) {
    require_range((std::string(what) + "_count").c_str(), count,
                  static_cast<int64_t>(forms_.size()), static_cast<int64_t>(forms_.size()));
    require_pointer(what, buffers);
    for (size_t i = 0; i < forms_.size(); ++i) {
      const TensorForm& form = forms_[i];
      const int64_t wanted = checked_product("The batch", {batch_, form.values});
      const std::string name = std::string(what) + " '" + form.name + "'";
      require_memory(name.c_str(), buffers[i].data, buffers[i].values, wanted, 4);
      const bool as_is = !form.is_turned() || (planar && form.planar);
      void* data = buffers[i].data;
      if (!as_is) {
        own_.emplace_back(static_cast<size_t>(wanted) * 4);
        data = own_.back().data();
      }
      maps.push_back({data, wanted, planar && form.planar && form.is_turned()});
      callers_.push_back(as_is ? nullptr : static_cast<float*>(buffers[i].data));
    }
  }

  // Turns what the caller gave as [N, C, H, W].
  void turn_in() const {
    for (size_t i = 0; i < forms_.size(); ++i) {
      if (callers_[i] == nullptr) continue;
      turn(callers_[i], images(i), forms_[i].sizes[1], pixels(i),
           static_cast<float*>(maps[i].data));
    }
  }

  // Turns what the caller wants as [N, C, H, W].
  void turn_out() const {
    for (size_t i = 0; i < forms_.size(); ++i) {
      if (callers_[i] == nullptr) continue;
      turn(static_cast<float*>(maps[i].data), images(i), pixels(i), forms_[i].sizes[1],
           callers_[i]);
    }
  }

  std::vector<MapMemory> maps;

 private:
  int64_t images(size_t i) const { return batch_ * forms_[i].sizes[0]; }
  int64_t pixels(size_t i) const { return forms_[i].sizes[2] * forms_[i].sizes[3]; }

  const std::vector<TensorForm>& forms_;
  int64_t batch_;
  std::vector<float*> callers_;  // memory that is turned, null: none is
  std::vector<Bytes> own_;
};

void run(const biper_model& model, int64_t batch, const biper_buffer* inputs, int64_t input_count,
         const biper_buffer* outputs, int64_t output_count) {
  require_range("batch", batch, 0, std::numeric_limits<int32_t>::max());
  CallMemory from(model.loaded.inputs, batch), to(model.loaded.outputs, batch);
  from.take("input", inputs, input_count, true);
  to.take("output", outputs, output_count, false);
  from.turn_in();
  model.loaded.program->run(batch, from.maps, to.maps, model.threads);
  to.turn_out();
}

void prepare(const biper_model& model, int64_t batch, const biper_image* images, float* out) {
  if (!model.preprocessing) {
    fail(model.no_preprocessing + " Prepare the images yourself, and call biper_run.");
  }
  for (int64_t i = 0; i < batch; ++i) {
    prepare_image(*model.preprocessing, images[i], out + i * model.loaded.inputs[0].values);
  }
}

}  // namespace
}  // namespace biper

extern "C" {

const char* biper_version(void) {
  return BIPER_TEXT(BIPER_VERSION_MAJOR) "." BIPER_TEXT(BIPER_VERSION_MINOR) "." BIPER_TEXT(
      BIPER_VERSION_PATCH);
}

const char* biper_error(void) { return biper::last_error.c_str(); }

biper_status biper_load(const char* path, const biper_options* options, biper_model** model) {
  if (model != nullptr) *model = nullptr;
  return biper::guarded([&] {
    biper::require_pointer("path", path);
    biper::require_pointer("model", model);
    biper::load(path, biper::read_bytes(path), options, model);
  });
}

biper_status biper_load_memory(const void* bytes, size_t size, const biper_options* options,
                               biper_model** model) {
  if (model != nullptr) *model = nullptr;
  return biper::guarded([&] {
    biper::require_pointer("bytes", bytes);
    biper::require_pointer("model", model);
    biper::Bytes copy(size);
    std::memcpy(copy.data(), bytes, size);
    biper::load("<memory>", std::move(copy), options, model);
  });
}

void biper_free(biper_model* model) { delete model; }

int64_t biper_input_count(const biper_model* model) {
  return model == nullptr ? 0 : static_cast<int64_t>(model->loaded.inputs.size());
}

int64_t biper_output_count(const biper_model* model) {
  return model == nullptr ? 0 : static_cast<int64_t>(model->loaded.outputs.size());
}

biper_status biper_input(const biper_model* model, int64_t index, biper_tensor* tensor) {
  return biper::guarded([&] {
    biper::require_pointer("model", model);
    biper::describe(model->loaded.inputs, index, tensor);
  });
}

biper_status biper_output(const biper_model* model, int64_t index, biper_tensor* tensor) {
  return biper::guarded([&] {
    biper::require_pointer("model", model);
    biper::describe(model->loaded.outputs, index, tensor);
  });
}

int64_t biper_class_count(const biper_model* model) {
  return model == nullptr ? 0 : static_cast<int64_t>(model->classes.size());
}

const char* biper_class_name(const biper_model* model, int64_t index) {
  if (index < 0 || index >= biper_class_count(model)) return nullptr;
  return model->classes[static_cast<size_t>(index)].c_str();
}

biper_status biper_run(const biper_model* model, int64_t batch, const biper_buffer* inputs,
                       int64_t input_count, const biper_buffer* outputs, int64_t output_count) {
  return biper::guarded([&] {
    biper::require_pointer("model", model);
    biper::run(*model, batch, inputs, input_count, outputs, output_count);
  });
}

int biper_has_preprocessing(const biper_model* model) {
  return model != nullptr && model->preprocessing.has_value();
}

biper_status biper_prepare_images(const biper_model* model, int64_t batch,
                                  const biper_image* images, const biper_buffer* input) {
  return biper::guarded([&] {
    biper::require_pointer("model", model);
    biper::require_pointer("images", images);
    biper::require_pointer("input", input);
    biper::require_range("batch", batch, 0, std::numeric_limits<int32_t>::max());
    const int64_t values = model->loaded.inputs[0].values;
    biper::require_memory("input", input->data, input->values,
                          biper::checked_product("The batch", {batch, values}), 4);
    biper::prepare(*model, batch, images, static_cast<float*>(input->data));
  });
}

biper_status biper_run_images(const biper_model* model, int64_t batch, const biper_image* images,
                              const biper_buffer* outputs, int64_t output_count) {
  return biper::guarded([&] {
    biper::require_pointer("model", model);
    biper::require_pointer("images", images);
    biper::require_range("batch", batch, 0, std::numeric_limits<int32_t>::max());
    const int64_t values =
        biper::checked_product("The batch", {batch, model->loaded.inputs[0].values});
    const biper::Bytes memory(static_cast<size_t>(values) * 4);
    biper::prepare(*model, batch, images, reinterpret_cast<float*>(memory.data()));
    const biper_buffer input{memory.data(), values};
    biper::run(*model, batch, &input, 1, outputs, output_count);
  });
}

}  // extern "C"
