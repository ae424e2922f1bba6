// Names shared by launchers and bindings, without CUDA headers.

#pragma once

namespace biper {

// The storage type of a value of a float map or of an image. kNone: the map is absent.
enum StreamType : int { kNone = 0, kFloat32 = 1, kFloat16 = 2, kBfloat16 = 3, kUint8 = 4 };

}  // namespace biper
