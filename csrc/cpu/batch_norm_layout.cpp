#include "cpu/batch_norm_layout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <vector>

namespace dcx::norm {

namespace {

// A size of 1 may have any stride, which says nothing.
bool dense_pixels(const Tensor& x, int64_t step) {
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) {
    if (x.size(dim) != 1 && x.stride(dim) != step) return false;
    step *= x.size(dim);
  }
  return true;
}

// Channels of the buffer if channels are innermost, or 0.
int64_t padded_last(const Tensor& x) {
  const Sizes sizes = sizes_of(x);
  if (sizes.channels != 1 && x.stride(1) != 1) return 0;
  int64_t padded = sizes.channels;
  if (sizes.samples != 1) {
    if (x.stride(0) % sizes.pixels) return 0;
    padded = x.stride(0) / sizes.pixels;
  }
  for (int64_t dim = 2; dim < x.dim(); ++dim) {  // the last pixel dimension decides
    if (x.size(dim) != 1) padded = x.stride(dim);
  }
  const bool whole = sizes.samples == 1 || x.stride(0) == padded * sizes.pixels;
  return whole && padded >= sizes.channels && dense_pixels(x, padded) ? padded : 0;
}

// Channels of the buffer if pixels are innermost, or 0.
int64_t padded_first(const Tensor& x) {
  const Sizes sizes = sizes_of(x);
  if (!dense_pixels(x, 1)) return 0;
  if (sizes.channels != 1 && x.stride(1) != sizes.pixels) return 0;
  if (sizes.samples == 1) {  // a batch of 1 may be of a wider buffer or not: the stride tells
    const int64_t padded = x.stride(0) / sizes.pixels;
    return x.stride(0) % sizes.pixels == 0 && padded > sizes.channels ? padded : sizes.channels;
  }
  if (x.stride(0) % sizes.pixels) return 0;
  const int64_t padded = x.stride(0) / sizes.pixels;
  return padded >= sizes.channels ? padded : 0;
}

int64_t padded(const Tensor& x, bool last) { return last ? padded_last(x) : padded_first(x); }

}  // namespace

Sizes sizes_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) pixels *= x.size(dim);
  return {x.size(0), x.size(1), pixels};
}

std::pair<Tensor, Layout> recognise(const Tensor& x) {
  if (const int64_t wide = padded_last(x)) return {x, {true, wide}};
  const Sizes sizes = sizes_of(x);
  if (sizes.pixels > 1) {
    if (const int64_t wide = padded_first(x)) return {x, {false, wide}};
  }
  return {torch::stable::contiguous(x), {sizes.pixels == 1, sizes.channels}};
}

std::pair<Tensor, Layout> agree(const Tensor& t, const Tensor& x, Layout like) {
  if (const int64_t wide = padded(t, like.last)) return {t, {like.last, wide}};
  Tensor copy = empty_like(x, like);
  torch::stable::copy_(copy, t);
  return {copy, like};
}

std::pair<Tensor, Layout> in_order(const Tensor& t, bool last) {
  if (const int64_t wide = padded(t, last)) return {t, {last, wide}};
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return {torch::stable::contiguous(t, format), {last, t.size(1)}};
}

Tensor empty_like(const Tensor& x, Layout layout) {
  const Sizes sizes = sizes_of(x);
  if (layout.padded == sizes.channels) return torch::stable::empty_like(x);
  const std::array<int64_t, 1> all{sizes.samples * layout.padded * sizes.pixels};
  const Tensor buffer = torch::stable::new_empty(x, {all.data(), 1});
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{
      from(buffer), from(x.sizes()), from(x.strides()), from(std::optional<int64_t>(0))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::as_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dcx::norm
