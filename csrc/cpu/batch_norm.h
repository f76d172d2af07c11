// What the forward and backward operators of batch norm share: vectors over channels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/batch_norm_loops.h"

namespace dcx::norm {

using torch::headeronly::ScalarType;

// Read a vector of float32, float64 or bfloat16; `otherwise` where there is none.
std::vector<double> read(
    const std::optional<Tensor>& vector, int64_t count, double otherwise, const char* name);

// Write a vector of float32 or float64.
void write(const std::vector<double>& values, double* to);
void write(const std::vector<double>& values, float* to);

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The dtype of statistics: float64 for float64, else float32.
inline ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_input(const Tensor& x, const char* name);
void check_like(const Tensor& t, const Tensor& x, const char* name, const char* what);

// Call `work` with a value of the C++ type of x.
template <class Work>
void by_type(const Tensor& x, const Work& work) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return work(float{});
    case ScalarType::Double:
      return work(double{});
    default:
      return work(BFloat16{});
  }
}

}  // namespace dcx::norm
