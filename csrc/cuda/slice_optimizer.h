// Optimizer steps at the active slices of many parameters: one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcx {

enum class Float { kFloat, kHalf, kBfloat16 };

struct SliceTable {
  const int64_t* lines;  // of launch/slices.h
  int count;
  int columns;
  int blocks;
  Float dtype;  // of parameters, gradients and state
};

// own columns: parameter, packed gradient, with momentum: buffer, whether it has yet to be seeded
struct SgdSlices {
  SliceTable table;
  float lr, momentum, undamped, weight_decay, sign;
  bool has_momentum, nesterov;
};

// own columns: parameter, packed gradient, first and second moment, step size and sqrt of the
// second correction (bits of float64), with amsgrad: maximum of the second moment
struct AdamwSlices {
  SliceTable table;
  float decay, beta1, rest1, beta2, rest2, eps, sign;
  bool amsgrad;
};

void sgd_slices(const SgdSlices& step, cudaStream_t stream);
void adamw_slices(const AdamwSlices& step, cudaStream_t stream);

}  // namespace dcx
