// Checks of the arguments of per-sample convolutions, before anything is written.

#include "cpu/sample_conv.h"

#include <torch/headeronly/core/ScalarType.h>

namespace dcx {

using torch::headeronly::ScalarType;

void check_channels(const char* name, const char* which, const Lists& idx, int64_t samples,
                    int64_t active, int64_t channels) {
  if (!idx) {
    DCX_CHECK(active == channels, name, words("all ", channels, " channels without ", which),
              active);
    return;
  }
  DCX_CHECK(idx->is_cpu() && idx->scalar_type() == ScalarType::Long && idx->is_contiguous(), name,
            words(which, " contiguous, int64, on the CPU"), "another");
  DCX_CHECK(idx->dim() == 2 && idx->size(0) == samples && idx->size(1) == active, name,
            words(which, " of ", samples, " times ", active, " channels"),
            words(idx->numel(), " channels"));
  const int64_t* channel = channels_of(idx, 0);
  for (int64_t i = 0; i < samples * active; ++i) {
    DCX_CHECK(channel[i] >= 0 && channel[i] < channels, name,
              words("channels below ", channels, " in ", which), channel[i]);
  }
}

Window check_window(const char* name, const Tensor& weight, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation) {
  DCX_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, name,
            "two numbers of stride, padding and dilation", "others");
  Window window{weight.size(2), weight.size(3), {}, {}, {}};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t s = stride[axis], p = padding[axis], d = dilation[axis];
    const int64_t taps = weight.size(2 + axis);
    DCX_CHECK(s > 0 && p >= 0 && d > 0 && taps > 0, name,
              "positive strides, dilations and filter sizes, paddings not negative",
              words(s, ", ", d, ", ", taps, " and ", p));
    window.stride[axis] = s, window.padding[axis] = p, window.dilation[axis] = d;
  }
  return window;
}

Window check_sample_conv(const char* name, const Tensor& x, const Tensor& weight, const Tensor& y,
                         const Lists& in_idx, const Lists& out_idx, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation) {
  for (const Tensor* tensor : {&x, &weight, &y}) {
    DCX_CHECK(tensor->is_cpu() && tensor->dim() == 4, name, "4-D tensors on the CPU", tensor->dim());
    DCX_CHECK(tensor->scalar_type() == x.scalar_type(), name, "one dtype", "several");
  }
  const ScalarType type = x.scalar_type();
  DCX_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, "float32 or float64",
            torch::headeronly::toString(type));
  const Window window = check_window(name, weight, stride, padding, dilation);
  const int64_t samples = x.size(0);
  DCX_CHECK(y.size(0) == samples, name, words(samples, " samples"), y.size(0));
  check_channels(name, "in_idx", in_idx, samples, x.size(1), weight.size(1));
  check_channels(name, "out_idx", out_idx, samples, y.size(1), weight.size(0));
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t pixels = output_pixels(window, axis, x.size(2 + axis));
    DCX_CHECK(y.size(2 + axis) == pixels, name, words(pixels, " pixels"), y.size(2 + axis));
  }
  return window;
}

}  // namespace dcx
