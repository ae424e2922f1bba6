// What launchers and bindings name alike, free of CUDA headers.

#pragma once

namespace biper {

// How a value of a float map or of an image is stored. kNone: the map is absent.
enum StreamType : int { kNone = 0, kFloat32 = 1, kFloat16 = 2, kBfloat16 = 3, kUint8 = 4 };

}  // namespace biper
