// Keywords and types of CUDA.

#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __align__(BYTES) __attribute__((aligned(BYTES)))

constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 from) : x(from.x), y(from.y), z(from.z) {}
};

// Memory of any type is read and written through these, and only where it is aligned to them.
#define BIPER_EMULATOR_VECTOR(BYTES) __attribute__((may_alias, aligned(BYTES)))

struct BIPER_EMULATOR_VECTOR(4) uchar4 {
  unsigned char x, y, z, w;
};
struct BIPER_EMULATOR_VECTOR(4) ushort2 {
  unsigned short x, y;
};
struct BIPER_EMULATOR_VECTOR(8) ushort4 {
  unsigned short x, y, z, w;
};
struct BIPER_EMULATOR_VECTOR(8) int2 {
  int x, y;
};
struct BIPER_EMULATOR_VECTOR(16) int4 {
  int x, y, z, w;
};
struct BIPER_EMULATOR_VECTOR(8) uint2 {
  unsigned x, y;
};
struct BIPER_EMULATOR_VECTOR(16) uint4 {
  unsigned x, y, z, w;
};
struct BIPER_EMULATOR_VECTOR(8) float2 {
  float x, y;
};
struct BIPER_EMULATOR_VECTOR(16) float4 {
  float x, y, z, w;
};

#undef BIPER_EMULATOR_VECTOR

inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
  return {x, y, z, w};
}
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z,
                            unsigned short w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
