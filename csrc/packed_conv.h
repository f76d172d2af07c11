// Convolution by the library that PyTorch calls, on the packed active slice of a weight: one
// operator call instead of three, on any device that can pack.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "launch/pack.h"

namespace dcx {

using Sizes = std::vector<int64_t>;
using Lists = std::optional<Tensor>;

struct PackedConv {  // arguments of both operators
  Sizes stride, padding, dilation;
  int64_t groups, active_groups;
};

inline void check_pack(const char* name, const Tensor& weight, const Lists& in_idx,
                       const Lists& out_idx, const PackedConv& conv, int64_t c) {
  DCX_CHECK(weight.dim() == 4 && weight.is_contiguous(), name, "a contiguous 4-D weight", "another");
  for (const Lists* list : {&in_idx, &out_idx}) {
    if (!*list) continue;
    const Tensor& idx = **list;
    const bool fine = idx.scalar_type() == torch::headeronly::ScalarType::Long && idx.dim() == 1 &&
                      idx.is_contiguous() && idx.is_cpu() == weight.is_cpu();
    DCX_CHECK(fine, name, "contiguous 1-D int64 lists on the device of the weight", "others");
  }
  const int64_t k = out_idx ? out_idx->size(0) : weight.size(0);
  const int64_t group_c = conv.active_groups > 0 ? c / conv.active_groups : 0;
  DCX_CHECK(conv.groups > 0 && conv.active_groups > 0 && group_c > 0 && k > 0, name,
            "active channels and groups", "none");
  DCX_CHECK(c == group_c * conv.active_groups && k % conv.active_groups == 0, name,
            "channels that the active groups divide", c);
  const int64_t listed = in_idx ? in_idx->size(0) : c;
  DCX_CHECK(listed == c, name, "as many channels of x as in_idx has", c);
  const bool all = in_idx || group_c == weight.size(1);
  DCX_CHECK(all, name, "all channels of the weight without in_idx", group_c);
}

// `pack` copies on the device: void(const PackParams&, const Tensor& weight).
template <typename Pack>
Tensor packed_weight(const Tensor& weight, const Lists& in_idx, const Lists& out_idx,
                     const PackedConv& conv, int64_t c, Pack pack) {
  if (!in_idx && !out_idx) return weight;
  const int64_t k = out_idx ? out_idx->size(0) : weight.size(0), R = weight.size(2),
                S = weight.size(3);
  const int64_t group_c = c / conv.active_groups;
  const int64_t sizes[] = {k, group_c, R, S};
  Tensor to = torch::stable::new_empty(weight, {sizes, 4});
  pack(PackParams{weight.const_data_ptr(), to.mutable_data_ptr(),
                  out_idx ? static_cast<const int64_t*>(out_idx->const_data_ptr()) : nullptr,
                  in_idx ? static_cast<const int64_t*>(in_idx->const_data_ptr()) : nullptr, k,
                  k / conv.active_groups, group_c, weight.size(1), R * S,
                  static_cast<int64_t>(weight.element_size())},
       weight);
  return to;
}

template <typename Pack>
Tensor packed_bias(const Tensor& bias, const Lists& out_idx, Pack pack) {
  if (!out_idx) return bias;
  const int64_t k = out_idx->size(0);
  Tensor to = torch::stable::new_empty(bias, {&k, 1});
  pack(PackParams{bias.const_data_ptr(), to.mutable_data_ptr(),
                  static_cast<const int64_t*>(out_idx->const_data_ptr()), nullptr, k, k, 1, 1, 1,
                  static_cast<int64_t>(bias.element_size())},
       bias);
  return to;
}

template <typename Pack>
Tensor packed_conv2d_fwd(const Tensor& x, const Tensor& weight, const Lists& bias,
                         const Lists& in_idx, const Lists& out_idx, const PackedConv& conv,
                         Pack pack) {
  using torch::stable::detail::from;
  check_pack("packed_conv2d_fwd", weight, in_idx, out_idx, conv, x.size(1));
  if (bias) {
    DCX_CHECK(bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == weight.size(0),
              "packed_conv2d_fwd", "a contiguous bias for every output channel", bias->numel());
  }
  const Tensor packed = packed_weight(weight, in_idx, out_idx, conv, x.size(1), pack);
  StableIValue chosen = from(std::nullopt);
  if (bias) chosen = from(Lists(packed_bias(*bias, out_idx, pack)));
  const Sizes zeros = {0, 0};
  std::array<StableIValue, 9> stack{from(x),           from(packed),       chosen,
                                    from(conv.stride), from(conv.padding), from(conv.dilation),
                                    from(false),       from(zeros),        from(conv.active_groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// dx (N, c, H, W) and dw (k, c / G_act, R, S), each empty where not asked for.
template <typename Pack>
std::tuple<Tensor, Tensor> packed_conv2d_bwd(const Tensor& dy, const Tensor& x,
                                             const Tensor& weight, const Lists& in_idx,
                                             const Lists& out_idx, const PackedConv& conv,
                                             bool need_dx, bool need_dw, Pack pack) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  check_pack("packed_conv2d_bwd", weight, in_idx, out_idx, conv, x.size(1));
  const int64_t k = out_idx ? out_idx->size(0) : weight.size(0);
  DCX_CHECK(dy.size(1) == k, "packed_conv2d_bwd", "as many channels of dy as out_idx has",
            dy.size(1));
  const Tensor packed = packed_weight(weight, in_idx, out_idx, conv, x.size(1), pack);
  const Sizes zeros = {0, 0};
  const bool mask[] = {need_dx, need_dw, false};
  std::array<StableIValue, 11> stack{
      from(dy),
      from(x),
      from(packed),
      from(std::nullopt),
      from(conv.stride),
      from(conv.padding),
      from(conv.dilation),
      from(false),
      from(zeros),
      from(conv.active_groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3)),
  };
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor dx = to<Tensor>(stack[0]), dw = to<Tensor>(stack[1]);
  const Tensor rest = to<Tensor>(stack[2]);  // owned, if undefined
  const int64_t none = 0;
  return {need_dx ? dx : torch::stable::new_empty(x, {&none, 1}),
          need_dw ? dw : torch::stable::new_empty(x, {&none, 1})};
}

}  // namespace dcx
