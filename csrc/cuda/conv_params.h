// From shapes and strides to the parameters of launches. Plain C++: no CUDA, no tensors.
#pragma once

#include <vector>

#include "cuda/channel_conv2d.h"

namespace dcx {

struct ConvImage {
  void* data;
  int64_t size[4], stride[4];  // N, channels, height, width; in elements
};

// Full (K, C, R, S), contiguous, with lists of active channels (null: all); `per_sample`: lists are
// (N, k), (N, c).
struct ConvWeight {
  const void* data;
  const void* bias;  // (K,) or null
  int64_t size[4];
  const int64_t* out_list;
  const int64_t* in_list;
  bool per_sample;
};

struct ConvWindow {
  int64_t stride[2], padding[2], dilation[2];
};

inline conv::Window along(int axis, const ConvImage& x, const int64_t* weight_size,
                          const ConvWindow& window) {
  return {x.size[2 + axis], weight_size[2 + axis], window.stride[axis], window.padding[axis],
          window.dilation[axis]};
}

// All but the maps of pixels. `transposed`: source channels are the weight's output channels.
inline ConvParams conv_params(const ConvImage& source, const ConvImage& out,
                              const ConvWeight& weight, bool transposed) {
  ConvParams p{};
  const int64_t taps = weight.size[2] * weight.size[3];
  const int64_t weight_k = weight.size[1] * taps, weight_c = taps;
  p.source = source.data;
  p.weight = weight.data;
  p.bias = weight.bias;
  p.out = out.data;
  p.source_list = transposed ? weight.out_list : weight.in_list;
  p.out_list = transposed ? weight.in_list : weight.out_list;
  p.weight_source = transposed ? weight_k : weight_c;
  p.weight_out = transposed ? weight_c : weight_k;
  p.source_list_stride = weight.per_sample ? source.size[1] : 0;
  p.out_list_stride = weight.per_sample ? out.size[1] : 0;
  p.problems = static_cast<int32_t>(weight.per_sample ? source.size[0] : 1);
  p.images = static_cast<int32_t>(weight.per_sample ? 1 : source.size[0]);
  p.source_n = source.stride[0];
  p.source_c = source.stride[1];
  p.source_y = source.stride[2];
  p.source_x = source.stride[3];
  p.out_n = out.stride[0];
  p.out_c = out.stride[1];
  p.out_y = out.stride[2];
  p.out_x = out.stride[3];
  p.source_channels = static_cast<int32_t>(source.size[1]);
  p.out_channels = static_cast<int32_t>(out.size[1]);
  p.filter_columns = static_cast<int32_t>(weight.size[3]);
  return p;
}

inline ConvParams conv_fwd_params(const ConvImage& x, const ConvImage& y, const ConvWeight& weight,
                                  const ConvWindow& window) {
  ConvParams p = conv_params(x, y, weight, false);
  p.y = conv::fwd_axis(along(0, x, weight.size, window));
  p.x = conv::fwd_axis(along(1, x, weight.size, window));
  return p;
}

// One launch for each phase of the stride. Pixels that no tap reaches are in none of them:
// `conv_dgrad_covers` tells whether there are any.
inline std::vector<ConvParams> conv_dgrad_params(const ConvImage& dy, const ConvImage& dx,
                                                 const ConvWeight& weight,
                                                 const ConvWindow& window) {
  ConvParams p = conv_params(dy, dx, weight, true);
  p.bias = nullptr;
  std::vector<ConvParams> launches;
  for (const conv::Axis& y : conv::dgrad_axes(along(0, dx, weight.size, window))) {
    for (const conv::Axis& x : conv::dgrad_axes(along(1, dx, weight.size, window))) {
      p.y = y;
      p.x = x;
      launches.push_back(p);
    }
  }
  return launches;
}

inline bool conv_dgrad_covers(const ConvImage& dx, const std::vector<ConvParams>& launches) {
  int64_t pixels = 0;
  for (const ConvParams& p : launches) pixels += static_cast<int64_t>(p.y.size) * p.x.size;
  return pixels == dx.size[2] * dx.size[3];
}

inline ConvWgradParams conv_wgrad_params(const ConvImage& dy, const ConvImage& x,
                                         const int64_t* taps, const ConvWindow& window) {
  ConvWgradParams p{};
  p.dy = dy.data;
  p.x = x.data;
  p.dy_n = dy.stride[0];
  p.dy_c = dy.stride[1];
  p.dy_y = dy.stride[2];
  p.dy_x = dy.stride[3];
  p.x_n = x.stride[0];
  p.x_c = x.stride[1];
  p.x_y = x.stride[2];
  p.x_x = x.stride[3];
  p.k = static_cast<int32_t>(dy.size[1]);
  p.c = static_cast<int32_t>(x.size[1]);
  p.height = static_cast<int32_t>(x.size[2]);
  p.width = static_cast<int32_t>(x.size[3]);
  p.P = static_cast<int32_t>(dy.size[2]);
  p.Q = static_cast<int32_t>(dy.size[3]);
  p.pixels = dy.size[0] * dy.size[2] * dy.size[3];
  p.taps_y = static_cast<int32_t>(taps[0]);
  p.taps_x = static_cast<int32_t>(taps[1]);
  p.stride_y = static_cast<int32_t>(window.stride[0]);
  p.stride_x = static_cast<int32_t>(window.stride[1]);
  p.padding_y = static_cast<int32_t>(window.padding[0]);
  p.padding_x = static_cast<int32_t>(window.padding[1]);
  p.dilation_y = static_cast<int32_t>(window.dilation[0]);
  p.dilation_x = static_cast<int32_t>(window.dilation[1]);
  return p;
}

}  // namespace dcx
