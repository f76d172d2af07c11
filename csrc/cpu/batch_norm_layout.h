// How compact tensors (N, k, ...) lie in memory, for batch norm.
//
// Legend: N samples, k channels, P pixels a sample, K = kp >= k channels of the buffer.
#pragma once

#include <cstdint>
#include <utility>

#include "checks.h"

namespace dcx::norm {

// Channels innermost (NHWC, matrices) or pixels innermost (NCHW), in a buffer of `padded` channels.
struct Layout {
  bool last;
  int64_t padded;
};

struct Sizes {
  int64_t samples, channels, pixels;
};

Sizes sizes_of(const Tensor& x);

// Return `x`, or a contiguous copy where its strides are neither, with its layout.
std::pair<Tensor, Layout> recognise(const Tensor& x);

// Return `t`, or a copy of it with the strides of `x`, of layout `like`: the same order as `like`.
std::pair<Tensor, Layout> agree(const Tensor& t, const Tensor& x, Layout like);

// Return `t`, or a contiguous copy with channels (`last`, four dimensions) or pixels innermost.
std::pair<Tensor, Layout> in_order(const Tensor& t, bool last);

// Return an uninitialised tensor with sizes and strides of `x`, at the head of its own buffer.
Tensor empty_like(const Tensor& x, Layout layout);

}  // namespace dcx::norm
