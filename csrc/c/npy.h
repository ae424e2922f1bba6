// Arrays and images in files: .npy of NumPy, PGM and PPM, and raw float32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Contents of a file. Throws std::runtime_error where it cannot be read.
std::string read_file(const std::string& path);

struct Array {
  bool is_bytes = false;  // uint8, else float32
  std::vector<int64_t> sizes;
  std::string values;  // as in memory
};

// Whether contents are those of an .npy file, or of a PGM or PPM image.
bool is_npy(const std::string& contents);
bool is_pixmap(const std::string& contents);

// Each throws std::runtime_error where the contents are of another kind than it reads.
Array read_npy(const std::string& path, const std::string& contents);
Array read_pixmap(const std::string& path, const std::string& contents);  // [H, W, C] of bytes

void write_npy(const std::string& path, const std::vector<int64_t>& sizes,
               const std::vector<float>& values);
