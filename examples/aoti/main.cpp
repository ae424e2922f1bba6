// Runs a package that `biper export FILE -o NAME.pt2` wrote, on raw float32 images.
//
//     biper-aoti NAME.pt2 IMAGES.f32 N,C,H,W
//
// Prints the outputs, a line for each image. Operators come from operators.cpp, not from Python.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<int64_t> sizes_of(const std::string& text) {
  std::vector<int64_t> sizes;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) sizes.push_back(std::stoll(part));
  return sizes;
}

at::Tensor read_images(const std::string& path, const std::vector<int64_t>& sizes) {
  at::Tensor images = at::empty(sizes, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(images.data_ptr()), static_cast<std::streamsize>(images.nbytes()));
  TORCH_CHECK(file && file.peek() == EOF, path, " must hold ", images.nbytes(), " bytes");
  return images;
}

void run(const std::string& package, const at::Tensor& images) {
  TORCH_CHECK(std::ifstream(package).good(), "cannot read ", package);
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader loader(package);
  for (const at::Tensor& output : loader.run({images})) {
    const at::Tensor rows = output.flatten(1).contiguous();
    for (int64_t i = 0; i < rows.size(0); ++i) {
      const float* row = rows[i].const_data_ptr<float>();
      for (int64_t j = 0; j < rows.size(1); ++j) std::printf(j == 0 ? "%.9g" : " %.9g", row[j]);
      std::printf("\n");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s NAME.pt2 IMAGES.f32 N,C,H,W\n", arguments[0]);
    return 2;
  }
  try {
    run(arguments[1], read_images(arguments[2], sizes_of(arguments[3])));
  } catch (const c10::Error& error) {  // its own words, without the stack
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
