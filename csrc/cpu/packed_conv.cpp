// Convolution on packed weights: the CPU's side.

#include "packed_conv.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

namespace dcx {

namespace {

void check_bounds(const char* which, const int64_t* list, int64_t length, int64_t channels) {
  for (int64_t i = 0; list != nullptr && i < length; ++i) {
    DCX_CHECK(list[i] >= 0 && list[i] < channels, "packed_conv2d",
              std::string(which) + " below " + std::to_string(channels), list[i]);
  }
}

template <int64_t kBytes>
void copy_rows(const PackParams& p, int64_t first, int64_t last) {
  const int64_t bytes = kBytes > 0 ? kBytes : p.taps * p.element_size;  // known: no call to copy
  const auto* from = static_cast<const unsigned char*>(p.from);
  auto* to = static_cast<unsigned char*>(p.to);
  for (int64_t o = first; o < last; ++o) {
    const int64_t out = p.out_list != nullptr ? p.out_list[o] : o;
    const int64_t* in = p.in_list != nullptr ? p.in_list + o / p.group_k * p.group_c : nullptr;
    const unsigned char* row = from + out * p.full_group_c * bytes;
    if (in == nullptr) {
      std::memcpy(to + o * p.group_c * bytes, row, static_cast<size_t>(p.group_c * bytes));
      continue;
    }
    for (int64_t i = 0; i < p.group_c; ++i) {
      std::memcpy(to + (o * p.group_c + i) * bytes, row + in[i] % p.full_group_c * bytes,
                  static_cast<size_t>(bytes));
    }
  }
}

void pack(const PackParams& p, const Tensor& weight) {
  check_bounds("out_idx", p.out_list, p.k, weight.size(0));
  const int64_t groups = p.k / p.group_k;
  if (p.in_list != nullptr && groups == 1) {
    check_bounds("in_idx", p.in_list, p.group_c, p.full_group_c);
  } else if (p.in_list != nullptr) {
    check_bounds("in_idx", p.in_list, groups * p.group_c, INT64_MAX);
  }
  const int64_t bytes = p.taps * p.element_size;
  const int64_t grain = 1 + (1 << 15) / (p.group_c * bytes);
  torch::stable::parallel_for(0, p.k, grain, [&](int64_t first, int64_t last) {
    switch (bytes) {
      case 4: return copy_rows<4>(p, first, last);
      case 36: return copy_rows<36>(p, first, last);
      default: return copy_rows<0>(p, first, last);
    }
  });
}

Tensor fwd(Tensor x, Tensor weight, Lists bias, Lists in_idx, Lists out_idx, Sizes stride,
           Sizes padding, Sizes dilation, int64_t groups, int64_t active_groups) {
  const PackedConv conv{stride, padding, dilation, groups, active_groups};
  return packed_conv2d_fwd(x, weight, bias, in_idx, out_idx, conv, pack);
}

std::tuple<Tensor, Tensor> bwd(Tensor dy, Tensor x, Tensor weight, Lists in_idx, Lists out_idx,
                               Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                               int64_t active_groups, bool need_dx, bool need_dw) {
  const PackedConv conv{stride, padding, dilation, groups, active_groups};
  return packed_conv2d_bwd(dy, x, weight, in_idx, out_idx, conv, need_dx, need_dw, pack);
}

}  // namespace

}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("packed_conv2d_fwd", TORCH_BOX(&dcx::fwd));
  m.impl("packed_conv2d_bwd", TORCH_BOX(&dcx::bwd));
}
