// Accesses of 16 bytes, and numbers of 16 bits as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dcx {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename To, typename From>
struct Convert {
  static __device__ __forceinline__ To of(From x) { return x; }
};
template <>
struct Convert<__half, float> {
  static __device__ __forceinline__ __half of(float x) { return __float2half_rn(x); }
};
template <>
struct Convert<__nv_bfloat16, float> {
  static __device__ __forceinline__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
};

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return Convert<T, float>::of(x);
}

// Registers that are read and written 16 bytes at a time.
template <typename T, int N>
struct alignas(16) Vector {
  static_assert(N * sizeof(T) % 16 == 0, "whole accesses");
  T at[N];
};

template <typename T>
__device__ __forceinline__ bool aligned(const T* place) {
  return reinterpret_cast<uintptr_t>(place) % 16 == 0;
}

template <typename T, int N>
__device__ __forceinline__ void load_vector(const T* place, Vector<T, N>& values) {
  constexpr int kAccesses = N * sizeof(T) / 16;
#pragma unroll
  for (int access = 0; access < kAccesses; ++access) {
    reinterpret_cast<int4*>(&values)[access] = reinterpret_cast<const int4*>(place)[access];
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_vector(T* place, const Vector<T, N>& values) {
  constexpr int kAccesses = N * sizeof(T) / 16;
#pragma unroll
  for (int access = 0; access < kAccesses; ++access) {
    reinterpret_cast<int4*>(place)[access] = reinterpret_cast<const int4*>(&values)[access];
  }
}

}  // namespace dcx
