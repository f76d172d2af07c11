// Convolution on packed weights: the GPU's side.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/channel_conv2d.h"
#include "cuda/stream.h"
#include "packed_conv.h"

namespace dcx {

namespace {

using torch::stable::accelerator::DeviceGuard;

void pack(const PackParams& params, const Tensor& weight) {
  const int64_t size = params.element_size;
  DCX_CHECK(size == 2 || size == 4 || size == 8, "packed_conv2d", "elements of 2, 4 or 8 bytes",
            size);
  pack_weight(params, current_stream(weight));
}

Tensor fwd(Tensor x, Tensor weight, Lists bias, Lists in_idx, Lists out_idx, Sizes stride,
           Sizes padding, Sizes dilation, int64_t groups, int64_t active_groups) {
  const DeviceGuard guard(x.get_device_index());
  const PackedConv conv{stride, padding, dilation, groups, active_groups};
  return packed_conv2d_fwd(x, weight, bias, in_idx, out_idx, conv, pack);
}

std::tuple<Tensor, Tensor> bwd(Tensor dy, Tensor x, Tensor weight, Lists in_idx, Lists out_idx,
                               Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                               int64_t active_groups, bool need_dx, bool need_dw) {
  const DeviceGuard guard(x.get_device_index());
  const PackedConv conv{stride, padding, dilation, groups, active_groups};
  return packed_conv2d_bwd(dy, x, weight, in_idx, out_idx, conv, need_dx, need_dw, pack);
}

}  // namespace

}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) {
  m.impl("packed_conv2d_fwd", TORCH_BOX(&dcx::fwd));
  m.impl("packed_conv2d_bwd", TORCH_BOX(&dcx::bwd));
}
