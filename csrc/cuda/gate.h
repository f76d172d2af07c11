// The channels that a per-sample gate lets through.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcx {

enum class GateType { kFloat, kHalf, kBfloat16, kDouble };

struct Winners {
  const void* g;     // (samples, channels), strides in elements
  int64_t* indices;  // (samples, winners), ascending
  void* values;      // (samples, winners), g there
  int64_t stride_n, stride_c;
  int samples, channels, winners;
};

void k_winners(const Winners& params, GateType type, cudaStream_t stream);

}  // namespace dcx
