#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "errors.h"
#include "sha256.h"

namespace biper {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMostHeaderBytes = 100000000;  // as in safetensors
constexpr int64_t kFormat = 0;
constexpr size_t kSumDigits = 64;
// Our header is a JSON string inside JSON, hence the escaped quotes.
constexpr std::string_view kSumKey = "\\\"sha256\\\":\\\"", kSumEnd = "\\\"";

constexpr int64_t kMostSize = (int64_t{1} << 31) - 1;
constexpr size_t kMostRank = 8;
constexpr int64_t kMostValues = int64_t{1} << 40;
constexpr int64_t kMostOffset = int64_t{1} << 60;

struct TensorType {
  std::string_view name;
  int64_t bytes;
};

constexpr TensorType kTypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"I16", 2}, {"I32", 4},
                                 {"I64", 8},  {"F16", 2}, {"BF16", 2}, {"F32", 4}, {"F64", 8}};

struct Foreign {
  std::string_view start;
  const char* kind;
  const char* advice;
};

constexpr Foreign kForeign[] = {
    {"PK\x03\x04", "a torch checkpoint (a zip archive)", "run `biper convert` on it"},
    {"\x80", "a pickle, probably an old torch checkpoint", "run `biper convert` on it"},
    {"\x89HDF", "an HDF5 file", "export it to a torch checkpoint first"},
    {"\x1f\x8b", "a gzip archive", "unpack it first"},
    {"GGUF", "a GGUF file", "it cannot be read here"},
    {"\x08", "perhaps an ONNX model", "convert the PyTorch model instead"},
};

[[noreturn]] void refuse_foreign(const std::string& name, std::string_view start) {
  const char* kind = "of an unknown kind";
  const char* advice = "pass a file that `engine.save` wrote";
  for (const Foreign& foreign : kForeign) {
    if (start.substr(0, foreign.start.size()) != foreign.start) continue;
    kind = foreign.kind;
    advice = foreign.advice;
    break;
  }
  refuse_file(name + " is not a .biper file: this is " + kind + "; " + advice + ".");
}

std::string number(uint64_t value) { return std::to_string(value); }

std::string shown(const std::string& text) { return "'" + text.substr(0, 100) + "'"; }

// The position behind the header.
size_t header_end(const std::string& name, std::string_view bytes) {
  if (bytes.size() <= kLengthBytes) {
    refuse_file(name + " is " + number(bytes.size()) +
                " bytes, too short for any .biper file; copy or save it again.");
  }
  uint64_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | static_cast<unsigned char>(bytes[i]);
  }
  const bool fits = length >= 1 && length <= kMostHeaderBytes - kLengthBytes;
  if (bytes[kLengthBytes] != '{' || !fits) refuse_foreign(name, bytes);
  const uint64_t end = kLengthBytes + length;
  if (end > bytes.size()) {
    refuse_file(name + " is truncated: file is " + number(bytes.size()) +
                " bytes, its header alone needs " + number(end) + "; copy or download it again.");
  }
  return static_cast<size_t>(end);
}

Json parse(const std::string& name, std::string_view text) {
  try {
    return parse_json(text);
  } catch (const std::invalid_argument& error) {
    refuse_file(name + " is damaged: its header is not JSON (" + error.what() +
                "); copy or save it again.");
  }
}

void take_header(const std::string& name, const Json& outer, File& file) {
  const Json* metadata = outer.find("__metadata__");
  const Json* text = metadata != nullptr ? metadata->find("biper") : nullptr;
  if (text == nullptr || !text->is(Json::Kind::kString)) {
    refuse_file(name +
                " is not a .biper file: this is a safetensors file without the header `biper`, "
                "probably plain weights; convert the model that they belong to.");
  }
  file.header_text = text->text;
  file.header = parse(name, file.header_text);
  if (!file.header.is(Json::Kind::kObject)) {
    refuse_file(name + " is damaged: its header `biper` is not a JSON object.");
  }
}

void require_format(const std::string& name, const Json& header) {
  const Json* format = header.find("format");
  const bool whole =
      format != nullptr && (format->is(Json::Kind::kInteger) || format->is(Json::Kind::kLarge));
  if (!whole) refuse_file(name + " is damaged: its format version is not an integer.");
  if (format->is(Json::Kind::kInteger) && format->integer == kFormat) return;
  refuse_file(name + " has another format than " + number(kFormat) +
              ", the only one that this version of the library reads; upgrade it.");
}

// -- the table of tensors -------------------------------------------------------------------------

struct Entry {
  std::string name;
  FileTensor tensor;
  int64_t start, end;
};

[[noreturn]] void refuse_tensor(const std::string& name, const std::string& key,
                                const std::string& what) {
  refuse_file(name + " is damaged: tensor " + shown(key) + " " + what + "; save it again.");
}

Entry entry_of(const std::string& name, const std::string& key, const Json& value) {
  const Json* type = value.find("dtype");
  const Json* sizes = value.find("shape");
  const Json* offsets = value.find("data_offsets");
  if (type == nullptr || !type->is(Json::Kind::kString) || sizes == nullptr ||
      !sizes->is(Json::Kind::kArray) || offsets == nullptr || !offsets->is(Json::Kind::kArray) ||
      offsets->items.size() != 2) {
    refuse_file(name + " is damaged: its table of tensors is unreadable; copy or save it again.");
  }
  if (value.items.size() != 3) refuse_tensor(name, key, "has unknown entries");
  const auto known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const TensorType& t) { return t.name == type->text; });
  if (known == std::end(kTypes)) {
    refuse_file(name + " cannot be read: tensor " + shown(key) + " has the unknown dtype " +
                shown(type->text) + ".");
  }
  Entry entry{key, {}, 0, 0};
  entry.tensor.type = type->text;
  bool fits = sizes->items.size() <= kMostRank;
  for (const Json& size : sizes->items) {
    fits = fits && size.is(Json::Kind::kInteger) && size.integer >= 0 && size.integer <= kMostSize;
  }
  if (!fits) refuse_tensor(name, key, "has an impossible shape");
  const Json &start = offsets->items[0], &end = offsets->items[1];
  if (!start.is(Json::Kind::kInteger) || !end.is(Json::Kind::kInteger) || start.integer < 0 ||
      start.integer > end.integer || end.integer >= kMostOffset) {
    refuse_tensor(name, key, "is at impossible bytes");
  }
  entry.start = start.integer;
  entry.end = end.integer;
  bool overflow = false;
  int64_t bytes = 0;
  for (const Json& size : sizes->items) {
    entry.tensor.sizes.push_back(size.integer);
    overflow =
        overflow || __builtin_mul_overflow(entry.tensor.values, size.integer, &entry.tensor.values);
  }
  const bool none = std::find(entry.tensor.sizes.begin(), entry.tensor.sizes.end(), 0) !=
                    entry.tensor.sizes.end();
  if (none) entry.tensor.values = 0;
  overflow = (overflow && !none) || entry.tensor.values > kMostValues ||
             __builtin_mul_overflow(entry.tensor.values, known->bytes, &bytes);
  if (overflow || bytes != entry.end - entry.start) {
    refuse_tensor(name, key, "has not the bytes of its shape");
  }
  entry.tensor.bytes = static_cast<size_t>(bytes);
  return entry;
}

std::map<std::string, FileTensor> table_of(const std::string& name, const Json& outer,
                                           std::string_view bytes, size_t first) {
  std::vector<Entry> entries;
  for (size_t i = 0; i < outer.items.size(); ++i) {
    if (outer.keys[i] == "__metadata__") continue;
    entries.push_back(entry_of(name, outer.keys[i], outer.items[i]));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.start != b.start ? a.start < b.start : a.end < b.end;
  });
  uint64_t promised = first;
  for (const Entry& entry : entries) {
    promised = std::max(promised, first + static_cast<uint64_t>(entry.end));
  }
  if (bytes.size() != promised) {
    refuse_file(name + (bytes.size() < promised ? " is truncated" : " has bytes after its end") +
                ": file is " + number(bytes.size()) + " bytes, header promises " +
                number(promised) + "; copy or download it again.");
  }
  std::map<std::string, FileTensor> table;
  int64_t end = 0;
  for (Entry& entry : entries) {
    if (entry.start != end) {
      refuse_tensor(name, entry.name, "does not begin where the one before it ends");
    }
    end = entry.end;
    entry.tensor.data = bytes.data() + first + static_cast<size_t>(entry.start);
    table.emplace(entry.name, std::move(entry.tensor));
  }
  return table;
}

// -- the checksum ---------------------------------------------------------------------------------

bool is_sum(std::string_view text) {
  return text.size() == kSumDigits && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

// Positions of the digits of every sum in the header.
std::vector<size_t> sums_in(std::string_view start) {
  std::vector<size_t> found;
  size_t at = 0;
  while ((at = start.find(kSumKey, at)) != std::string_view::npos) {
    at += kSumKey.size();
    if (is_sum(start.substr(at, kSumDigits)) &&
        start.substr(std::min(start.size(), at + kSumDigits), kSumEnd.size()) == kSumEnd) {
      found.push_back(at);
    }
  }
  return found;
}

void require_sum(const std::string& name, const Json& header, std::string_view bytes, size_t end) {
  const auto refuse = [&] {
    refuse_file(name +
                " was edited or damaged: its SHA-256 is not the one in its header; copy it again, "
                "or save it again from the engine.");
  };
  const std::vector<size_t> sums = sums_in(bytes.substr(0, end));
  const Json* said = header.find("sha256");
  if (sums.size() != 1 || said == nullptr || !said->is(Json::Kind::kString) ||
      said->text != bytes.substr(sums[0], kSumDigits)) {
    refuse();
  }
  const std::string zeros(kSumDigits, '0');
  const size_t behind = sums[0] + kSumDigits;
  Sha256 digest;
  digest.add(bytes.data(), sums[0]);
  digest.add(zeros.data(), zeros.size());
  digest.add(bytes.data() + behind, bytes.size() - behind);
  if (digest.finish() != said->text) refuse();
}

}  // namespace

Bytes::Bytes(size_t size) : memory_(nullptr, std::free), size_(size) {
  constexpr size_t kLine = 64;
  if (size > static_cast<size_t>(std::numeric_limits<std::ptrdiff_t>::max()) - kLine) {
    throw std::bad_alloc();
  }
  const size_t whole = size / kLine * kLine + kLine;
  memory_.reset(static_cast<char*>(std::aligned_alloc(kLine, whole)));
  if (!memory_) throw std::bad_alloc();
}

Bytes read_bytes(const std::string& path) {
  const auto refuse = [&](int number) {
    const std::string reason = number == ENOENT   ? "there is no such file"
                               : number == EACCES ? "you may not read it"
                                                  : std::strerror(number);
    throw Error(BIPER_ERROR_READ, "Cannot read '" + path + "': " + reason + ".");
  };
  // Without O_NONBLOCK, opening a pipe would wait for a process that writes to it.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) refuse(errno);
  struct Closer {
    int descriptor;
    ~Closer() { ::close(descriptor); }
  } closer{descriptor};
  struct stat status{};
  if (::fstat(descriptor, &status) != 0) refuse(errno);
  if (!S_ISREG(status.st_mode)) {
    refuse_file(path + " is no regular file; pass a file that `engine.save` wrote.");
  }
  Bytes bytes(static_cast<size_t>(status.st_size));
  for (size_t filled = 0; filled < bytes.size();) {
    const ssize_t count = ::read(descriptor, bytes.data() + filled, bytes.size() - filled);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) refuse(errno);
    if (count == 0) {
      refuse_file(path + " is truncated: it became shorter while it was read; copy it again.");
    }
    filled += static_cast<size_t>(count);
  }
  return bytes;
}

File open_file(const std::string& name, Bytes owned) {
  File file;
  file.bytes = std::make_shared<const Bytes>(std::move(owned));
  const std::string_view bytes = file.bytes->view();
  const size_t end = header_end(name, bytes);
  const Json outer = parse(name, bytes.substr(kLengthBytes, end - kLengthBytes));
  take_header(name, outer, file);
  require_format(name, file.header);
  file.tensors = table_of(name, outer, bytes, end);
  require_sum(name, file.header, bytes, end);
  return file;
}

}  // namespace biper
