#include "program_section.h"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "errors.h"
#include "sha256.h"
#include "steps.h"
#include "strides.h"

namespace biper {
namespace {

using Kind = Json::Kind;

constexpr int64_t kVersion = 2;
constexpr int64_t kUnsealedVersion = 1;  // says nothing about the graph that it belongs to
constexpr std::string_view kUnsealed = "proof/";
constexpr size_t kMostEntries = size_t{1} << 20;  // of a list of steps
constexpr size_t kMostTensors = 1024;             // inputs or outputs

// Whatever is wrong with a section is an invalid_argument until `load_program` names the file.
const Json& item(const Json& value, const char* key, Kind kind) {
  const Json* found = value.find(key);
  if (found == nullptr || !found->is(kind)) {
    fail("`" + std::string(key) + "` is missing, or of another type.");
  }
  return *found;
}

int64_t integer_of(const Json& value) {
  if (!value.is(Kind::kInteger)) fail("An integer is wanted.");
  return value.integer;
}

std::vector<int64_t> integers_of(const Json& value) {
  if (!value.is(Kind::kArray)) fail("A list of integers is wanted.");
  std::vector<int64_t> found;
  for (const Json& each : value.items) found.push_back(integer_of(each));
  return found;
}

MapShape shape_of(const Json& value) {
  if (!value.is(Kind::kArray) || value.items.size() != 4 || !value.items[3].is(Kind::kBool)) {
    fail("A map has a height, a width, channels, and whether it is packed.");
  }
  const auto size = [&](size_t i) { return integer_of(value.items[i]); };
  return {size(0), size(1), size(2), value.items[3].flag};
}

// -- arguments ------------------------------------------------------------------------------------

// Tensors that steps read: in the file's bytes, or copies where those are not aligned, or a view.
class Tensors {
 public:
  explicit Tensors(const File& file) : file_(file) {}

  // A tensor as `Arguments` has memory: address, elements and type.
  std::vector<int64_t> memory(const Json& value) {
    const std::string& name = item(value, "tensor", Kind::kString).text;
    const auto found = file_.tensors.find(name);
    if (found == file_.tensors.end()) {
      fail("The file has no tensor '" + name.substr(0, 100) + "'.");
    }
    const bool is_unpacked = value.find("channels") != nullptr;
    const FileTensor tensor = is_unpacked ? unpacked(value, found->second) : found->second;
    const Type type = type_named(name, tensor.type);
    if (value.items.size() == 1) {
      const bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % type.bytes == 0;
      const char* data = aligned ? tensor.data : copy(tensor, type, {tensor.values}, {1}, 0);
      return {reinterpret_cast<int64_t>(data), tensor.values, type.number};
    }
    if (value.items.size() != (is_unpacked ? 7 : 4)) {
      fail("A view of a tensor has sizes, strides and an offset.");
    }
    const std::vector<int64_t> sizes = integers_of(item(value, "sizes", Kind::kArray));
    const std::vector<int64_t> strides = integers_of(item(value, "strides", Kind::kArray));
    const int64_t offset = item(value, "offset", Kind::kInteger).integer;
    require_places("a view", sizes, strides, offset, tensor.values);
    int64_t values = 1;
    for (const int64_t size : sizes) values = checked_product("The view", {values, size});
    require_range("values of a view", values, 1, tensor.values);
    return {reinterpret_cast<int64_t>(copy(tensor, type, sizes, strides, offset)), values,
            type.number};
  }

 private:
  struct Type {
    int64_t number;
    size_t bytes;
  };

  static Type type_named(const std::string& name, const std::string& type) {
    if (type == "F32") return {type_of<float>(), 4};
    if (type == "I32") return {type_of<uint32_t>(), 4};
    if (type == "BOOL") return {type_of<uint8_t>(), 1};
    fail("The tensor '" + name.substr(0, 100) + "' is " + type + ", which no step takes.");
  }

  // The values of an output channel's weights, which are where bits are 0 or 1.
  const float* channel_values(const Json& value, const char* key, int64_t outputs) {
    const auto found = file_.tensors.find(item(value, key, Kind::kString).text);
    if (found == file_.tensors.end() || found->second.type != "F32" ||
        found->second.values != outputs) {
      fail("`" + std::string(key) + "` is no tensor of a float for each output channel.");
    }
    const Type type = type_named(key, "F32");
    return reinterpret_cast<const float*>(copy(found->second, type, {outputs}, {1}, 0));
  }

  // What biper::unpack_weight makes of packed weights: [O, channels, KH, KW].
  FileTensor unpacked(const Json& value, const FileTensor& weight) {
    const int64_t channels = item(value, "channels", Kind::kInteger).integer;
    if (weight.type != "I32" || weight.sizes.size() != 4 || weight.values == 0) {
      fail("Packed weights are [O, KH, KW, words] int32.");
    }
    const int64_t outputs = weight.sizes[0], taps = weight.sizes[1] * weight.sizes[2],
                  words = weight.sizes[3];
    require_range("channels", channels, (words - 1) * kWordBits + 1, words * kWordBits);
    const float* low = channel_values(value, "low", outputs);
    const float* high = channel_values(value, "high", outputs);
    const int64_t values = checked_product("The weight", {outputs, channels, taps});
    copies_.emplace_back(static_cast<size_t>(values) * sizeof(float));
    float* out = reinterpret_cast<float*>(copies_.back().data());
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          uint32_t word = 0;
          const int64_t at = (o * taps + tap) * words + c / kWordBits;
          std::memcpy(&word, weight.data + at * 4, sizeof word);
          *out++ = (word >> (c % kWordBits) & 1u) != 0 ? high[o] : low[o];
        }
      }
    }
    return {"F32", {}, values, copies_.back().data()};
  }

  // Copies the values at some places, all of which the tensor has.
  const char* copy(const FileTensor& tensor, const Type& type, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, int64_t offset) {
    int64_t values = 1;
    for (const int64_t size : sizes) values *= size;
    copies_.emplace_back(std::max<size_t>(1, static_cast<size_t>(values) * type.bytes));
    char* out = copies_.back().data();
    std::vector<int64_t> at(sizes.size(), 0);
    for (int64_t i = 0; i < values; ++i) {
      int64_t place = offset;
      for (size_t d = 0; d < sizes.size(); ++d) place += at[d] * strides[d];
      std::memcpy(out, tensor.data + static_cast<size_t>(place) * type.bytes, type.bytes);
      out += type.bytes;
      for (size_t d = sizes.size(); d-- > 0;) {
        if (++at[d] < sizes[d]) break;
        at[d] = 0;
      }
    }
    return copies_.back().data();
  }

  const File& file_;
  std::vector<Bytes> copies_;
};

double named_float(const Json& value) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (value.text == "inf") return kInfinity;
  if (value.text == "-inf") return -kInfinity;
  if (value.text == "nan") return std::numeric_limits<double>::quiet_NaN();
  fail("There is no float '" + value.text.substr(0, 40) + "'.");
}

Arguments::Value argument(const Json& value, Tensors& tensors) {
  switch (value.kind) {
    case Kind::kNull:
      return std::monostate();
    case Kind::kBool:
      return value.flag;
    case Kind::kInteger:
      return value.integer;
    case Kind::kReal:
      return value.real;
    case Kind::kString:
      return value.text;
    case Kind::kArray:
      return integers_of(value);
    case Kind::kObject:
      if (value.find("tensor") != nullptr) return tensors.memory(value);
      if (value.items.size() == 1) return named_float(item(value, "float", Kind::kString));
      break;
    case Kind::kLarge:
      break;
  }
  fail("An argument has a value of no known kind.");
}

// -- the program ----------------------------------------------------------------------------------

void add_entry(Program& program, const Json& entry, Tensors& tensors) {
  if (const Json* shape = entry.find("map"); shape != nullptr) {
    program.add_map(shape_of(*shape));
  } else if (const Json* map = entry.find("view"); map != nullptr) {
    program.add_view(integer_of(*map), shape_of(item(entry, "as", Kind::kArray)));
  } else {
    const Json& named = item(entry, "args", Kind::kObject);
    Arguments::Values values;
    for (size_t i = 0; i < named.items.size(); ++i) {
      values.emplace(named.keys[i], argument(named.items[i], tensors));
    }
    add_step(program, item(entry, "step", Kind::kString).text, Arguments(std::move(values)));
  }
}

TensorForm form_of(const Program& program, const Json& entry, int64_t* map) {
  *map = item(entry, "map", Kind::kInteger).integer;
  const MapShape& shape = program.shape(*map);
  TensorForm form;
  form.name = item(entry, "name", Kind::kString).text;
  form.sizes = integers_of(item(entry, "sizes", Kind::kArray));
  form.packed = shape.packed;
  form.channels_last = item(entry, "channels_last", Kind::kBool).flag;
  const Json* planar = entry.find("planar");
  form.planar = planar != nullptr && planar->is(Kind::kBool) && planar->flag;
  require_range("number of sizes", static_cast<int64_t>(form.sizes.size()), 1, BIPER_MAX_RANK);
  for (const int64_t size : form.sizes) {
    require_range("size", size, 1, std::numeric_limits<int32_t>::max());
    form.values = checked_product("The tensor", {form.values, size});
  }
  if (form.values != shape.values()) fail("`" + form.name + "` has not the values of its map.");
  if ((form.channels_last || form.planar) && (form.sizes.size() != 4 || form.packed)) {
    fail("`" + form.name + "` has no channels.");
  }
  if (form.planar && !form.channels_last) fail("`" + form.name + "` has no pixels.");
  return form;
}

std::vector<TensorForm> forms_of(const Program& program, const Json& section, const char* key,
                                 std::vector<int64_t>& maps) {
  const Json& entries = item(section, key, Kind::kArray);
  require_range(key, static_cast<int64_t>(entries.items.size()), 1, kMostTensors);
  std::vector<TensorForm> forms;
  for (const Json& entry : entries.items) {
    maps.emplace_back();
    forms.push_back(form_of(program, entry, &maps.back()));
  }
  return forms;
}

// The program must take what the file's signature says, which is what Python goes by.
void require_signature(const Json& header, const std::vector<TensorForm>& inputs) {
  const Json& said = item(item(header, "signature", Kind::kObject), "inputs", Kind::kArray);
  bool same = said.items.size() == inputs.size();
  for (size_t i = 0; same && i < inputs.size(); ++i) {
    const Json& sizes = item(said.items[i], "shape", Kind::kArray);
    const std::string& type = item(said.items[i], "dtype", Kind::kString).text;
    same = item(said.items[i], "name", Kind::kString).text == inputs[i].name &&
           type == (inputs[i].packed ? "int32" : "float32") && inputs[i].sizes[0] == 1 &&
           sizes.items.size() == inputs[i].sizes.size() && sizes.items[0].is(Kind::kNull);
    for (size_t d = 1; same && d < inputs[i].sizes.size(); ++d) {
      same = sizes.items[d].is(Kind::kInteger) && sizes.items[d].integer == inputs[i].sizes[d];
    }
  }
  if (!same) fail("It takes other inputs than the signature of the file says.");
}

LoadedProgram make_program(const File& file, const Json& section) {
  auto program = std::make_unique<Program>();
  LoadedProgram made;
  Tensors tensors(file);
  const Json& entries = item(section, "steps", Kind::kArray);
  if (entries.items.size() > kMostEntries) fail("It has too many steps.");
  for (size_t i = 0; i < entries.items.size(); ++i) {
    try {
      add_entry(*program, entries.items[i], tensors);
    } catch (const std::invalid_argument& error) {
      fail("Entry " + std::to_string(i) + ": " + error.what());
    }
  }
  std::vector<int64_t> inputs, outputs;
  made.inputs = forms_of(*program, section, "inputs", inputs);
  made.outputs = forms_of(*program, section, "outputs", outputs);
  require_signature(file.header, made.inputs);
  program->finish(inputs, outputs);
  made.program = std::move(program);
  return made;
}

// The section of a file that has a program of this version.
const Json& section_of(const std::string& name, const Json& header) {
  const Json* section = header.find("program");
  if (section == nullptr) {
    throw Error(BIPER_ERROR_NO_PROGRAM,
                name +
                    " has no native program: save it again with this version of biper_engine, "
                    "`biper_engine.load(path).save(path, program=True)`.");
  }
  const Json* version = section->find("version");
  if (version == nullptr || !version->is(Kind::kInteger)) {
    refuse_file(name + " is damaged: its native program has no version; save it again.");
  }
  if (version->integer == kUnsealedVersion) {
    throw Error(BIPER_ERROR_NO_PROGRAM,
                name +
                    " was saved by an older version of biper_engine, whose native programs are not "
                    "tied to their graph: save it again with this one, "
                    "`biper_engine.load(path).save(path)`.");
  }
  if (version->integer != kVersion) {
    throw Error(BIPER_ERROR_NO_PROGRAM,
                name + " has a native program of version " + std::to_string(version->integer) +
                    ", but this library reads version " + std::to_string(kVersion) +
                    "; use the library of the biper_engine that saved it, or save it again.");
  }
  if (const Json* reason = section->find("reason"); reason != nullptr) {
    const std::string text = reason->is(Kind::kString) ? reason->text : "";
    throw Error(BIPER_ERROR_NO_PROGRAM,
                name + " is not one native program, and only such networks run here: " + text +
                    "; run it with biper_engine in Python.");
  }
  return *section;
}

// What ties a program to the graph and the tensors that it was saved with; for its definition see
// biper_engine/serialization/native_program.py.
std::string seal_of(const File& file) {
  Sha256 digest;
  const auto add = [&](std::string_view text, char end) {
    digest.add(text.data(), text.size());
    digest.add(&end, 1);
  };
  for (const char* key : {"graph", "signature", "program"}) {
    const Json* entry = file.header.find(key);
    const std::string_view text = file.header_text;
    add(entry == nullptr ? "null" : text.substr(entry->first, entry->last - entry->first), '\n');
  }
  for (const auto& [name, tensor] : file.tensors) {
    if (std::string_view(name).substr(0, kUnsealed.size()) == kUnsealed) continue;
    std::string sizes;
    for (const int64_t size : tensor.sizes) {
      sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
    }
    add(name, '\0');
    add(tensor.type, '\0');
    add(sizes, '\0');
    digest.add(tensor.data, tensor.bytes);
  }
  return digest.finish();
}

void require_seal(const std::string& name, const File& file) {
  const Json* seal = file.header.find("program_seal");
  if (seal != nullptr && seal->is(Kind::kString) && seal->text == seal_of(file)) return;
  refuse_file(name +
              ": its native program was not saved together with its graph and weights: a part "
              "comes from another file, or was edited. Save the network again, or copy the file.");
}

}  // namespace

LoadedProgram load_program(const std::string& name, const File& file) {
  const Json& section = section_of(name, file.header);
  require_seal(name, file);
  try {
    return make_program(file, section);
  } catch (const std::invalid_argument& error) {
    refuse_file(name + " has a wrong native program: " + error.what() +
                " The file was edited, or written by another program.");
  }
}

}  // namespace biper
