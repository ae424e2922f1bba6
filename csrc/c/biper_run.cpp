// biper-run: classifies images with a .biper file.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "biper.h"
#include "npy.h"

namespace {

constexpr char kHelp[] =
    R"(Usage: biper-run [OPTIONS] FILE IMAGE...
       biper-run FILE

Run the network of a .biper file on images, without Python; print the classes of each.
Without an image, describe the network.

An IMAGE is one of
  .pgm, .ppm   a grey or colour image of bytes: resized, cropped and normalised as FILE says
  .npy         float32 [N, C, H, W] or [C, H, W]: what the network takes, as it is;
               bytes [N, H, W, C], [H, W, C] or [H, W]: images, as above
  other        raw float32 values of whole images, as they are

Options:
  --top K         classes to print for an image (5)
  --threads T     threads of a call (BIPER_NUM_THREADS, else all processors)
  --output FILE   also write the network's first output to an .npy file
  --help          print this
  --version       print the version of the library

Exit status: 0 if all is well, 1 if a file cannot be used, 2 if the command line is wrong.
)";

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string file, output;
  std::vector<std::string> images;
  long long top = 5, threads = 0;
};

long long integer(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1 || value > 1024) {
    throw Usage(name + " (='" + text + "') must be an integer from 1 to 1024.");
  }
  return value;
}

Options options_of(int count, char** words) {
  Options options;
  bool only_files = false;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const bool is_option = !only_files && word.size() > 1 && word[0] == '-';
    if (!is_option) {
      options.file.empty() ? void(options.file = word) : options.images.push_back(word);
    } else if (word == "--") {
      only_files = true;
    } else if (word == "--help" || word == "-h") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    } else if (word == "--version") {
      std::printf("biper-run %s\n", biper_version());
      std::exit(0);
    } else if (word == "--top" || word == "--threads" || word == "--output") {
      if (i + 1 == count) throw Usage(word + " needs a value.");
      const std::string value = words[++i];
      if (word == "--top") options.top = integer(word, value);
      if (word == "--threads") options.threads = integer(word, value);
      if (word == "--output") options.output = value;
    } else {
      throw Usage("There is no option " + word + ".");
    }
  }
  if (options.file.empty()) throw Usage("Name a .biper file.");
  return options;
}

void check(biper_status status) {
  if (status != BIPER_OK) throw std::runtime_error(biper_error());
}

std::string text_of(const biper_tensor& tensor) {
  std::string text = "[N";
  if (tensor.sizes[0] != 1) text = "[" + std::to_string(tensor.sizes[0]) + " * N";
  for (int32_t d = 1; d < tensor.rank; ++d) text += ", " + std::to_string(tensor.sizes[d]);
  return text + (tensor.type == BIPER_FLOAT32 ? "] float32" : "] bits");
}

class Model {
 public:
  explicit Model(const Options& options) {
    biper_options how = BIPER_OPTIONS;
    how.threads = options.threads;
    check(biper_load(options.file.c_str(), &how, &model_));
    for (int64_t i = 0; i < biper_input_count(model_); ++i) {
      inputs.emplace_back();
      check(biper_input(model_, i, &inputs.back()));
    }
    for (int64_t i = 0; i < biper_output_count(model_); ++i) {
      outputs.emplace_back();
      check(biper_output(model_, i, &outputs.back()));
    }
  }
  ~Model() { biper_free(model_); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  void describe() const {
    for (const biper_tensor& x : inputs) std::printf("input %s: %s\n", x.name, text_of(x).c_str());
    for (const biper_tensor& x : outputs)
      std::printf("output %s: %s\n", x.name, text_of(x).c_str());
    std::printf("classes: %lld\n", static_cast<long long>(biper_class_count(model_)));
    std::printf("preprocessing: %s\n", biper_has_preprocessing(model_) ? "yes" : "no");
  }

  // Returns the values of the first output.
  std::vector<float> run(const std::vector<float>& values) const {
    if (inputs.size() != 1) {
      throw std::runtime_error("The network takes " + std::to_string(inputs.size()) +
                               " tensors; biper-run is for networks that take one.");
    }
    const int64_t each = inputs[0].values;
    const int64_t size = static_cast<int64_t>(values.size());
    if (inputs[0].type != BIPER_FLOAT32) throw std::runtime_error("The network takes bits.");
    std::vector<std::vector<float>> memory;
    std::vector<biper_buffer> buffers;
    for (const biper_tensor& x : outputs) {
      memory.emplace_back(static_cast<size_t>(size / each * x.values));
      buffers.push_back({memory.back().data(), static_cast<int64_t>(memory.back().size())});
    }
    const biper_buffer input{const_cast<float*>(values.data()), size};
    check(biper_run(model_, size / each, &input, 1, buffers.data(),
                    static_cast<int64_t>(buffers.size())));
    return std::move(memory[0]);
  }

  // Returns the images of a file as the network takes them.
  std::vector<float> read(const std::string& path) const {
    const std::string contents = read_file(path);
    if (is_pixmap(contents)) return prepared(path, read_pixmap(path, contents));
    Array array;
    if (is_npy(contents)) {
      array = read_npy(path, contents);
      if (array.is_bytes) return prepared(path, array);
    } else {
      array.values = contents;
    }
    const size_t image = static_cast<size_t>(inputs[0].values) * sizeof(float);
    if (array.values.empty() || array.values.size() % image != 0 || !fits(array.sizes)) {
      throw std::runtime_error("'" + path + "' has " + std::to_string(array.values.size()) +
                               " bytes of values, but the network takes " + text_of(inputs[0]) +
                               ", " + std::to_string(image) + " bytes for an image.");
    }
    std::vector<float> values(array.values.size() / sizeof(float));
    std::memcpy(values.data(), array.values.data(), array.values.size());
    return values;
  }

  std::string class_name(size_t index) const {
    const bool known = biper_class_count(model_) == outputs[0].values;
    return known ? biper_class_name(model_, static_cast<int64_t>(index)) : std::to_string(index);
  }

  std::vector<biper_tensor> inputs, outputs;

 private:
  // Whether an array's last sizes are those of an image; a raw file has none.
  bool fits(const std::vector<int64_t>& sizes) const {
    const size_t image = static_cast<size_t>(inputs[0].rank) - 1;
    if (sizes.empty()) return true;
    if (sizes.size() != image && sizes.size() != image + 1) return false;
    return std::equal(sizes.end() - static_cast<std::ptrdiff_t>(image), sizes.end(),
                      inputs[0].sizes + 1);
  }

  std::vector<float> prepared(const std::string& path, const Array& array) const {
    std::vector<int64_t> sizes = array.sizes;
    if (sizes.size() == 2) sizes.push_back(1);
    if (sizes.size() == 3) sizes.insert(sizes.begin(), 1);
    if (sizes.size() != 4) throw std::runtime_error("'" + path + "' is no image of bytes.");
    std::vector<biper_image> images;
    const int64_t bytes = sizes[1] * sizes[2] * sizes[3];
    for (int64_t n = 0; n < sizes[0]; ++n) {
      const char* pixels = array.values.data() + n * bytes;
      images.push_back({reinterpret_cast<const uint8_t*>(pixels), sizes[1], sizes[2], sizes[3], 0});
    }
    std::vector<float> values(images.size() * static_cast<size_t>(inputs[0].values));
    const biper_buffer input{values.data(), static_cast<int64_t>(values.size())};
    check(biper_prepare_images(model_, sizes[0], images.data(), &input));
    return values;
  }

  biper_model* model_ = nullptr;
};

void print_classes(const Model& model, const std::string& name, const float* logits,
                   long long top) {
  const size_t count = static_cast<size_t>(model.outputs[0].values);
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double sum = 0.0;
  for (size_t i = 0; i < count; ++i) {
    sum += std::exp(static_cast<double>(logits[i]) - static_cast<double>(logits[order[0]]));
  }
  std::printf("%s\n", name.c_str());
  for (size_t i = 0; i < std::min(count, static_cast<size_t>(top)); ++i) {
    const double logit = static_cast<double>(logits[order[i]]);
    const double share = std::exp(logit - static_cast<double>(logits[order[0]])) / sum;
    std::printf("  %-24s %6.1f %%  %9.3f\n", model.class_name(order[i]).c_str(), 100.0 * share,
                logit);
  }
}

void run(const Options& options) {
  const Model model(options);
  if (options.images.empty()) return model.describe();
  const biper_tensor& first = model.outputs[0];
  const bool classifies = first.rank == 2 && first.sizes[0] == 1 && first.type == BIPER_FLOAT32;
  if (!classifies && options.output.empty()) {
    throw std::runtime_error("The network returns " + text_of(first) +
                             ", no classes; write it to a file with --output.");
  }
  std::vector<float> all;
  for (const std::string& path : options.images) {
    const std::vector<float> values = model.run(model.read(path));
    const size_t each = static_cast<size_t>(first.values), images = values.size() / each;
    for (size_t n = 0; classifies && n < images; ++n) {
      const std::string name = images == 1 ? path : path + "[" + std::to_string(n) + "]";
      print_classes(model, name, values.data() + n * each, options.top);
    }
    all.insert(all.end(), values.begin(), values.end());
  }
  if (options.output.empty()) return;
  std::vector<int64_t> sizes(first.sizes, first.sizes + first.rank);
  sizes[0] *= static_cast<int64_t>(all.size()) / first.values;
  write_npy(options.output, sizes, all);
}

}  // namespace

int main(int count, char** words) {
  try {
    run(options_of(count, words));
    return std::fflush(stdout) == 0 ? 0 : 1;
  } catch (const Usage& error) {
    std::fprintf(stderr, "biper-run: %s See biper-run --help.\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "biper-run: %s\n", error.what());
    return 1;
  }
}
