// Operator of the global top-k: checks, and tensors for the launcher.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "checks.h"
#include "cuda/selection.h"
#include "cuda/stream.h"

namespace dcx {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMost = (int64_t{1} << 31) - 1024 - 1;  // i + blockDim.x is an int32

// bounds (groups + 1): who made them has made them from sizes that add up to the scores
std::tuple<Tensor, Tensor, Tensor> select(Tensor scores, Tensor bounds, int64_t budget,
                                          int64_t min_active) {
  const char* name = "select_channels";
  DCX_CHECK(scores.is_cuda() && scores.dim() == 1 && scores.is_contiguous(), name,
            "contiguous 1-D scores on a GPU", scores.dim());
  const bool is_double = scores.scalar_type() == ScalarType::Double;
  DCX_CHECK(is_double || scores.scalar_type() == ScalarType::Float, name, "float32 or float64",
            torch::headeronly::toString(scores.scalar_type()));
  const int32_t device = scores.get_device_index();
  DCX_CHECK(bounds.is_cuda() && bounds.get_device_index() == device, name,
            "bounds on the GPU of the scores", "others");
  DCX_CHECK(bounds.scalar_type() == ScalarType::Long && bounds.dim() == 1 &&
                bounds.is_contiguous() && bounds.size(0) > 1,
            name, "contiguous int64 bounds of at least one group", bounds.numel());
  const int64_t total = scores.size(0), groups = bounds.size(0) - 1;
  DCX_CHECK(groups <= total && total <= kMost, name, "a channel a group, below 2^31", total);
  DCX_CHECK(0 <= budget && budget <= total, name, "a budget of 0 to all channels", budget);
  DCX_CHECK(min_active >= 0, name, "min_active of at least 0", min_active);
  const DeviceGuard guard(device);
  const auto made = [&](int64_t length, ScalarType dtype) {
    return torch::stable::new_empty(scores, {&length, 1}, dtype);
  };
  const Tensor keys = made(total, is_double ? ScalarType::Long : ScalarType::Int);
  const Tensor limit = made(2, ScalarType::Long);
  const Tensor indices = made(total, ScalarType::Long), inverse = made(total, ScalarType::Long);
  const Tensor counts = made(groups, ScalarType::Long);
  select_channels({scores.const_data_ptr(), bounds.const_data_ptr<int64_t>(),
                   keys.mutable_data_ptr(), limit.mutable_data_ptr<int64_t>(),
                   indices.mutable_data_ptr<int64_t>(), inverse.mutable_data_ptr<int64_t>(),
                   counts.mutable_data_ptr<int64_t>(), static_cast<int>(total),
                   static_cast<int>(groups), static_cast<int>(budget),
                   static_cast<int>(min_active < total ? min_active : total), is_double},
                  current_stream(scores));
  return {indices, inverse, counts};
}

}  // namespace
}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) {
  m.impl("select_channels", TORCH_BOX(&dcx::select));
}
