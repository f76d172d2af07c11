// Checks of what Python hands over: sentences as in the Python package, before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace dcx {

using torch::stable::Tensor;

}  // namespace dcx

// "NAME: expected WHAT, got GOT"
#define DCX_CHECK(condition, name, what, got) \
  STD_TORCH_CHECK(condition, name, ": expected ", what, ", got ", got)
