// Launchers of the channel convolutions. Full weights are read through index lists; a shared set
// and a set for each sample are one kernel: lists advance by 0 or by their length.
#pragma once

#include <cstdint>

#include "launch/conv.h"
#include "launch/pack.h"

namespace dcx {

enum class ConvType { kBf16, kFp16, kTf32 };

// One pass over one map of pixels (launch/conv.h): out = sum over taps and channels of source times
// weight. Strides in elements.
struct ConvParams {
  const void* source;  // (problems * images, source_channels, y.src_size, x.src_size)
  const void* weight;
  const void* bias;  // (K,) or null
  void* out;         // (problems * images, out_channels, ...)
  // Which channels of the weight source and output channels are: null for the first ones.
  const int64_t* source_list;
  const int64_t* out_list;
  int64_t source_list_stride, out_list_stride;  // over problems: 0 or the length
  int64_t source_n, source_y, source_x, source_c;
  int64_t out_n, out_y, out_x, out_c;
  int64_t weight_source, weight_out;  // strides of the weight; its taps are contiguous
  int32_t problems, images;           // samples with the same lists are one problem
  int32_t source_channels, out_channels;
  int32_t filter_columns;  // S
  conv::Axis y, x;
};

// Weight gradient: partial (splits, k, R S c) fp32, one sum for each split of the pixels.
struct ConvWgradParams {
  const void* dy;
  const void* x;
  float* partial;
  int64_t dy_n, dy_y, dy_x, dy_c;
  int64_t x_n, x_y, x_x, x_c;
  int64_t pixels, pixels_per_split;  // N P Q
  int32_t splits;
  int32_t k, c, height, width, P, Q, taps_y, taps_x;
  int32_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// dw (K, C, R, S) from partial sums. A shared set: every split adds to every pair, and K, C are k,
// c. One set for each sample: split n is sample n, and the pair (K, C) is at (out_at[n, K],
// in_at[n, C]) of it, -1 for "not there"; null for "in its own place".
struct ConvReduceParams {
  const float* partial;
  void* dw;
  const int32_t* out_at;
  const int32_t* in_at;
  int64_t splits;
  int32_t K, C, k, c, taps;
};

void channel_conv2d(const ConvParams& params, ConvType type, conv::Tile tile, void* stream);
void channel_conv2d_wgrad(const ConvWgradParams& params, ConvType type, conv::Tile tile,
                          void* stream);
void channel_conv2d_reduce(const ConvReduceParams& params, ConvType type, void* stream);

// to[n, list[n, i]] = i, (samples, channels), and -1 elsewhere.
void invert_lists(const int64_t* list, int32_t* to, int64_t samples, int64_t active,
                  int64_t channels, void* stream);

void pack_weight(const PackParams& params, void* stream);

// What those launch for one type, each in a file of its own: they compile side by side.
template <typename T>
void channel_conv2d_of(const ConvParams& params, conv::Tile tile, void* stream);
template <typename T>
void channel_conv2d_wgrad_of(const ConvWgradParams& params, conv::Tile tile, void* stream);

}  // namespace dcx
