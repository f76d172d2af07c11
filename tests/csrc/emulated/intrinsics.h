// CUDA's device functions as far as kernels of csrc use them, on top of fibres.
#pragma once

#include <algorithm>
#include <cmath>

#include "fibres.h"

#define threadIdx (::dcx::emulated::self().index)
#define blockIdx (::dcx::emulated::block->index)
#define blockDim (::dcx::emulated::block->shape)
#define gridDim (::dcx::emulated::block->grid)
constexpr int warpSize = 32;

inline void __syncthreads() { dcx::emulated::barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace dcx::emulated {

struct Nothing {};

template <typename T>
struct Exchange {
  T brought, taken;
  int from;
};

template <typename T>
T exchange(unsigned mask, T value, int from) {
  Exchange<T> mine{value, value, from};
  warp_collective(
      mine,
      [](Exchange<T>* const* lanes) {
        for (int lane = 0; lane < kWarp; ++lane) {
          if (lanes[lane] == nullptr) continue;
          const Exchange<T>* source = lanes[lanes[lane]->from];
          if (source == nullptr) fail("a shuffle reads a lane that takes no part");
          lanes[lane]->taken = source->brought;
        }
      },
      mask);
  return mine.taken;
}

// width: the warp is cut into parts of so many lanes; out of range means one's own value
inline int source_lane(int offset_from, int width, bool up) {
  const int lane = rank() % kWarp, start = lane / width * width;
  const bool inside = up ? offset_from >= start : offset_from < start + width;
  return inside ? offset_from : lane;
}

struct Vote {
  bool said;
  unsigned all;
};

}  // namespace dcx::emulated

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  dcx::emulated::Nothing nothing;
  dcx::emulated::warp_collective(nothing, [](dcx::emulated::Nothing* const*) {}, mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = dcx::emulated::rank() % 32;
  return dcx::emulated::exchange(mask, value, lane / width * width + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int from = dcx::emulated::rank() % 32 ^ bits;
  return dcx::emulated::exchange(mask, value, dcx::emulated::source_lane(from, width, false));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  const int from = dcx::emulated::rank() % 32 + by;
  return dcx::emulated::exchange(mask, value, dcx::emulated::source_lane(from, width, false));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  const int from = dcx::emulated::rank() % 32 - by;
  return dcx::emulated::exchange(mask, value, dcx::emulated::source_lane(from, width, true));
}

inline unsigned __ballot_sync(unsigned mask, bool said) {
  dcx::emulated::Vote mine{said, 0};
  dcx::emulated::warp_collective(
      mine,
      [](dcx::emulated::Vote* const* lanes) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] != nullptr && lanes[lane]->said) all |= 1u << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] != nullptr) lanes[lane]->all = all;
        }
      },
      mask);
  return mine.all;
}
inline bool __any_sync(unsigned mask, bool said) { return __ballot_sync(mask, said) != 0; }
inline bool __all_sync(unsigned mask, bool said) { return __ballot_sync(mask, !said) == 0; }
inline int __syncthreads_or(int said) {
  static int any;  // blocks run one after the other
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= said != 0;
  __syncthreads();
  return any;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

template <typename T, typename U>
T atomicAdd(T* place, U value) {
  const T before = *place;
  *place = before + static_cast<T>(value);
  return before;
}
template <typename T, typename U>
T atomicMax(T* place, U value) {
  const T before = *place;
  *place = std::max(before, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicMin(T* place, U value) {
  const T before = *place;
  *place = std::min(before, static_cast<T>(value));
  return before;
}
template <typename T>
T atomicExch(T* place, T value) {
  const T before = *place;
  *place = value;
  return before;
}
template <typename T>
T atomicCAS(T* place, T expected, T value) {
  const T before = *place;
  if (before == expected) *place = value;
  return before;
}

namespace dcx::emulated {
template <typename T>
const T& aligned(const T* place) {
  if (reinterpret_cast<uintptr_t>(place) % alignof(T) != 0) fail("a load is not aligned");
  return *place;
}
}  // namespace dcx::emulated

template <typename T>
T __ldg(const T* place) {
  return dcx::emulated::aligned(place);
}
template <typename T>
T __ldcs(const T* place) {
  return dcx::emulated::aligned(place);
}
template <typename T>
void __stcs(T* place, T value) {
  dcx::emulated::aligned(place);
  *place = value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return std::exp(x); }

template <typename To, typename From>
To dcx_emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return dcx_emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return dcx_emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return dcx_emulated_bits<float>(x); }
inline float __int_as_float(int x) { return dcx_emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return dcx_emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return dcx_emulated_bits<double>(x); }
using std::max;
using std::min;
