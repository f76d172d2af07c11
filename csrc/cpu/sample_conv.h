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

// A sum becomes factor * ReLU(bias + sum); null: none.
template <typename T>
struct Gate {
  const T* bias;    // (K,)
  const T* factor;  // (N, k)
  bool relu;
};

// Every sample's active channels, arguments checked; T is float or double.
template <typename T>
void convolve_forward(const Tensor& y, const Tensor& x, const Tensor& weight, const Lists& in_idx,
                      const Lists& out_idx, const Window& window, const Gate<T>& gate);

// A list of channels for each of `samples`, `active` long, below `channels`.
void check_channels(const char* name, const char* which, const Lists& idx, int64_t samples,
                    int64_t active, int64_t channels);

Window check_window(const char* name, const Tensor& weight, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation);

// P (axis 0) or Q of an image of `size`.
inline int64_t output_pixels(const Window& w, int axis, int64_t size) {
  const int64_t span = w.dilation[axis] * ((axis ? w.S : w.R) - 1) + 1;
  const int64_t room = size + 2 * w.padding[axis] - span;
  return room < 0 ? 0 : room / w.stride[axis] + 1;
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
