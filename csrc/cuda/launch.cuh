// How every kernel is launched, and where its dynamic shared memory is: on a GPU and emulated.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dcx {

#ifdef DCX_EMULATED

inline unsigned char* shared_memory() { return emulated::block->shared; }

#else

// The dynamic shared memory of the block, 128-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dcx_shared[];
  return dcx_shared;
}

inline void check(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(status));
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 << 10) {  // more than every GPU gives without being asked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace dcx

// A kernel with template arguments goes into brackets: DCX_LAUNCH((move<int, 4>), grid, ...)
#ifdef DCX_EMULATED
#define DCX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                 \
   ::dcx::emulated::launch(grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
#else
#define DCX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::dcx::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)
#endif
