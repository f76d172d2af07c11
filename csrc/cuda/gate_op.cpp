// Operator of the per-sample gate: checks, and tensors for the launcher.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "checks.h"
#include "cuda/gate.h"
#include "cuda/stream.h"

namespace dcx {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMost = (int64_t{1} << 31) - 1024 - 1;  // i + blockDim.x is an int32

GateType gate_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return GateType::kFloat;
    case ScalarType::Half: return GateType::kHalf;
    case ScalarType::BFloat16: return GateType::kBfloat16;
    default: break;
  }
  DCX_CHECK(dtype == ScalarType::Double, "k_winners", "float16, bfloat16, float32 or float64",
            torch::headeronly::toString(dtype));
  return GateType::kDouble;
}

std::tuple<Tensor, Tensor> winners(Tensor g, int64_t k) {
  const char* name = "k_winners";
  DCX_CHECK(g.is_cuda() && g.dim() == 2, name, "g (N, C) on a GPU", g.dim());
  const GateType type = gate_type(g.scalar_type());
  const int64_t n = g.size(0), channels = g.size(1), sizes[] = {n, k};
  DCX_CHECK(n <= kMost && channels <= kMost, name, "less than 2^31 samples and channels",
            n > channels ? n : channels);
  DCX_CHECK(0 <= k && k <= channels, name, "0 to all channels as winners", k);
  const DeviceGuard guard(g.get_device_index());
  const Tensor indices = torch::stable::new_empty(g, {sizes, 2}, ScalarType::Long);
  const Tensor values = torch::stable::new_empty(g, {sizes, 2});
  k_winners({g.const_data_ptr(), indices.mutable_data_ptr<int64_t>(), values.mutable_data_ptr(),
             g.stride(0), g.stride(1), static_cast<int>(n), static_cast<int>(channels),
             static_cast<int>(k)},
            type, current_stream(g));
  return {indices, values};
}

}  // namespace
}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) { m.impl("k_winners", TORCH_BOX(&dcx::winners)); }
