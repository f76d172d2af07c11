// Convolution in which every sample has active channels of its own: what its parts share.
//
// N batch, K out and C in channels (k, c: active counts), H W input, P Q output, R S filter.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"

namespace dcx {

struct Window {
  int64_t R, S;
  int64_t stride[2], padding[2], dilation[2];
};

// One sample of a compact tensor, in any layout; strides in elements.
template <typename T>
struct Image {
  T* data;
  int64_t channel, row, column;  // strides
  int64_t height, width;
};

template <typename T>
Image<T> image_of(const Tensor& tensor, int64_t sample, T* data) {
  return {data + sample * tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3),                 tensor.size(2),   tensor.size(3)};
}

using Sizes = std::vector<int64_t>;
using Lists = std::optional<Tensor>;  // (N, active) int64; none: all channels

// Join parts of a message.
template <typename... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The three operators' arguments, checked: x and y (or dx and dy) are compact, weight is full.
Window check_sample_conv(const char* name, const Tensor& x, const Tensor& weight, const Tensor& y,
                         const Lists& in_idx, const Lists& out_idx, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation);

// The channels of one sample, or null: all.
inline const int64_t* channels_of(const Lists& idx, int64_t sample) {
  return idx ? static_cast<const int64_t*>(idx->const_data_ptr()) + sample * idx->size(1) : nullptr;
}

}  // namespace dcx
