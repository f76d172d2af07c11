// Operators of the channel convolutions: checks, and tensors unwrapped for the launchers. One set
// of active channels for all samples (1-D lists) or one each (2-D).

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>

#include "cuda/conv_params.h"
#include "cuda/stream.h"
#include "packed_conv.h"

namespace dcx {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

int64_t processors(const Tensor& tensor) {
  int count = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount,
                                                    tensor.get_device_index());
  DCX_CHECK(status == cudaSuccess, "channel_conv2d", "a device", cudaGetErrorString(status));
  return count;
}

ConvType type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return ConvType::kBf16;
    case ScalarType::Half: return ConvType::kFp16;
    default: break;
  }
  DCX_CHECK(tensor.scalar_type() == ScalarType::Float, name, "bfloat16, float16 or float32",
            torch::headeronly::toString(tensor.scalar_type()));
  return ConvType::kTf32;
}

ConvImage image_of(const char* name, const Tensor& tensor, const Tensor& like) {
  DCX_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
            "tensors on one GPU", "others");
  DCX_CHECK(tensor.dim() == 4 && tensor.scalar_type() == like.scalar_type(), name,
            "4-D tensors of one dtype", tensor.dim());
  DCX_CHECK(tensor.numel() > 0, name, "images that are not empty", "none");
  ConvImage image{tensor.data_ptr(), {}, {}};
  for (int i = 0; i < 4; ++i) {
    image.size[i] = tensor.size(i);
    image.stride[i] = tensor.stride(i);
  }
  DCX_CHECK(image.size[0] * image.size[2] * image.size[3] <= kMost && image.size[1] <= kMost, name,
            "fewer than 2^31 pixels", image.size[0] * image.size[2] * image.size[3]);
  return image;
}

const int64_t* list_of(const char* name, const Lists& idx, const ConvImage& image, int64_t channels,
                       bool per_sample) {
  if (!idx) {
    DCX_CHECK(image.size[1] == channels, name, "all channels without a list", image.size[1]);
    return nullptr;
  }
  DCX_CHECK(idx->is_cuda() && idx->scalar_type() == ScalarType::Long && idx->is_contiguous(), name,
            "contiguous int64 lists on the GPU", "others");
  DCX_CHECK(idx->dim() == (per_sample ? 2 : 1), name, "lists of one kind", idx->dim());
  DCX_CHECK(idx->numel() == image.size[1] * (per_sample ? image.size[0] : 1), name,
            "as many listed channels as the images have", idx->numel());
  return static_cast<const int64_t*>(idx->const_data_ptr());
}

bool per_sample(const Lists& in_idx, const Lists& out_idx) {
  return (in_idx && in_idx->dim() == 2) || (out_idx && out_idx->dim() == 2);
}

ConvWindow window_of(const char* name, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation, const ConvImage& x, const ConvImage& y, int64_t R,
                     int64_t S) {
  ConvWindow window{};
  DCX_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, name,
            "two numbers of stride, padding and dilation", stride.size());
  const int64_t taps[] = {0, 0, R, S};
  for (int i = 0; i < 2; ++i) {
    DCX_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && taps[2 + i] > 0, name,
              "positive strides, dilations and filters, paddings not negative", stride[i]);
    window.stride[i] = stride[i];
    window.padding[i] = padding[i];
    window.dilation[i] = dilation[i];
    const int64_t far = x.size[2 + i] + padding[i] + dilation[i] * taps[2 + i];
    DCX_CHECK(far < kMost / 4 && stride[i] < kMost / 4, name, "windows below 2^29 pixels", far);
    const int64_t pixels = conv::output_pixels(along(i, x, taps, window));
    DCX_CHECK(y.size[2 + i] == pixels, name, std::to_string(pixels) + " output pixels",
              y.size[2 + i]);
  }
  DCX_CHECK(x.size[0] == y.size[0], name, "as many samples out as in", y.size[0]);
  return window;
}

ConvWeight weight_of(const char* name, const Tensor& weight, const Lists& bias, const Tensor& like,
                     const ConvImage& x, const ConvImage& y, const Lists& in_idx,
                     const Lists& out_idx) {
  DCX_CHECK(weight.is_cuda() && weight.get_device_index() == like.get_device_index(), name,
            "the weight on the GPU of the images", "another");
  DCX_CHECK(weight.dim() == 4 && weight.is_contiguous() &&
                weight.scalar_type() == like.scalar_type(),
            name, "a contiguous 4-D weight in the dtype of the images", weight.dim());
  const bool sets = per_sample(in_idx, out_idx);
  DCX_CHECK(!sets || x.size[0] <= 65535, name, "at most 65535 samples with sets of their own",
            x.size[0]);
  ConvWeight made{weight.data_ptr(), nullptr, {}, nullptr, nullptr, sets};
  for (int i = 0; i < 4; ++i) made.size[i] = weight.size(i);
  if (bias) {
    DCX_CHECK(bias->is_cuda() && bias->is_contiguous() && bias->numel() == weight.size(0) &&
                  bias->scalar_type() == weight.scalar_type(),
              name, "a contiguous bias like the weight", bias->numel());
    made.bias = bias->const_data_ptr();
  }
  made.in_list = list_of(name, in_idx, x, weight.size(1), sets);
  made.out_list = list_of(name, out_idx, y, weight.size(0), sets);
  return made;
}

void launch(const ConvParams& p, ConvType type, const Tensor& out) {
  const int64_t pixels = static_cast<int64_t>(p.images) * p.y.size * p.x.size;
  const conv::Tile tile = conv::choose_tile(p.problems, pixels, p.out_channels, processors(out));
  channel_conv2d(p, type, tile, current_stream(out));
}

void fwd(Tensor y, Tensor x, Tensor weight, Lists bias, Lists in_idx, Lists out_idx, Sizes stride,
         Sizes padding, Sizes dilation) {
  const char* name = "conv2d_fwd";
  const ConvType type = type_of(name, x);
  const ConvImage from = image_of(name, x, x), to = image_of(name, y, x);
  const ConvWeight filters = weight_of(name, weight, bias, x, from, to, in_idx, out_idx);
  const ConvWindow window =
      window_of(name, stride, padding, dilation, from, to, weight.size(2), weight.size(3));
  const DeviceGuard guard(x.get_device_index());
  launch(conv_fwd_params(from, to, filters, window), type, y);
}

void dgrad(Tensor dx, Tensor dy, Tensor weight, Lists in_idx, Lists out_idx, Sizes stride,
           Sizes padding, Sizes dilation) {
  const char* name = "conv2d_dgrad";
  const ConvType type = type_of(name, dy);
  const ConvImage from = image_of(name, dy, dy), to = image_of(name, dx, dy);
  const ConvWeight filters = weight_of(name, weight, std::nullopt, dy, to, from, in_idx, out_idx);
  const ConvWindow window =
      window_of(name, stride, padding, dilation, to, from, weight.size(2), weight.size(3));
  const DeviceGuard guard(dy.get_device_index());
  const auto launches = conv_dgrad_params(from, to, filters, window);
  if (!conv_dgrad_covers(to, launches)) torch::stable::zero_(dx);
  for (const ConvParams& p : launches) launch(p, type, dx);
}

// dw (K, C, R, S): full for sets of samples, else of the active slice.
void wgrad(Tensor dw, Tensor dy, Tensor x, Lists in_idx, Lists out_idx, Sizes stride, Sizes padding,
           Sizes dilation) {
  const char* name = "conv2d_wgrad";
  const ConvType type = type_of(name, x);
  const ConvImage of_y = image_of(name, dy, x), of_x = image_of(name, x, x);
  const ConvWeight full = weight_of(name, dw, std::nullopt, x, of_x, of_y, in_idx, out_idx);
  DCX_CHECK(full.per_sample || (!in_idx && !out_idx), name, "lists of samples or none", "others");
  const ConvWindow window =
      window_of(name, stride, padding, dilation, of_x, of_y, dw.size(2), dw.size(3));
  const DeviceGuard guard(x.get_device_index());
  ConvWgradParams p = conv_wgrad_params(of_y, of_x, full.size + 2, window);
  const int64_t taps = full.size[2] * full.size[3], columns = taps * p.c;
  conv::Splits splits = conv::choose_splits(p.pixels, p.k, columns, processors(x));
  if (full.per_sample) {  // a split is a sample
    splits.splits = of_x.size[0];
    splits.pixels = of_y.size[2] * of_y.size[3];
  }
  DCX_CHECK(columns <= kMost && splits.splits <= 65535, name, "a filter below 2^31 entries", columns);
  p.splits = static_cast<int32_t>(splits.splits);
  p.pixels_per_split = splits.pixels;
  const int64_t sizes[] = {splits.splits * p.k * columns};
  const Tensor partial = torch::stable::new_empty(x, {sizes, 1}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  void* stream = current_stream(x);
  channel_conv2d_wgrad(p, type, splits.tile, stream);
  std::optional<Tensor> places[2];
  const int64_t* lists[] = {full.out_list, full.in_list};
  const int64_t active[] = {p.k, p.c};
  for (int i = 0; i < 2; ++i) {
    if (lists[i] == nullptr) continue;
    const int64_t length[] = {of_x.size[0] * full.size[i]};
    places[i] = torch::stable::new_empty(x, {length, 1}, ScalarType::Int);
    invert_lists(lists[i], static_cast<int32_t*>(places[i]->mutable_data_ptr()), of_x.size[0],
                 active[i], full.size[i], stream);
  }
  const auto places_of = [&](int i) {
    return places[i] ? static_cast<const int32_t*>(places[i]->const_data_ptr()) : nullptr;
  };
  const ConvReduceParams sum{p.partial,
                             dw.mutable_data_ptr(),
                             places_of(0),
                             places_of(1),
                             splits.splits,
                             static_cast<int32_t>(full.size[0]),
                             static_cast<int32_t>(full.size[1]),
                             p.k,
                             p.c,
                             static_cast<int32_t>(taps)};
  channel_conv2d_reduce(sum, type, stream);
}

void shared_wgrad(Tensor dw, Tensor dy, Tensor x, Sizes stride, Sizes padding, Sizes dilation) {
  wgrad(dw, dy, x, std::nullopt, std::nullopt, stride, padding, dilation);
}

}  // namespace

}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) {
  m.impl("channel_conv2d_fwd", TORCH_BOX(&dcx::fwd));
  m.impl("channel_conv2d_dgrad", TORCH_BOX(&dcx::dgrad));
  m.impl("channel_conv2d_wgrad", TORCH_BOX(&dcx::shared_wgrad));
  m.impl("sample_conv2d_fwd", TORCH_BOX(&dcx::fwd));
  m.impl("sample_conv2d_dgrad", TORCH_BOX(&dcx::dgrad));
  m.impl("sample_conv2d_wgrad", TORCH_BOX(&dcx::wgrad));
}
