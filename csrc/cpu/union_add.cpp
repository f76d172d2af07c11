// The sum of two compact tensors over the union of their channels, in one pass.
//
// Legend: N samples, a and b channels of the terms, u of the sum, P pixels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/batch_norm_layout.h"
#include "cpu/vectors.h"

namespace dcx {

namespace {

using namespace norm;

constexpr const char* NAME = "union_add";
constexpr int64_t GRAIN = 16384;  // entries that are worth a thread

// A term: where it begins, how far it is from row to row, the place of each of its channels.
template <class T>
struct Term {
  const T* data;
  int64_t stride;
  const int64_t* place;
  int64_t channels;
};

// Rows of channels: every row of the sum is put together while it is in the L1 cache.
// No term has more channels than `a`; one with all of them has them in order.
template <class T>
DCX_MULTIVERSION void add_rows(
    Term<T> a, Term<T> b, T* __restrict y, int64_t begin, int64_t end, int64_t channels) {
  for (int64_t r = begin; r < end; ++r) {
    T* to = y + r * channels;
    const T *from = a.data + r * a.stride, *more = b.data + r * b.stride;
    if (a.channels == channels && b.channels == channels) {
      for (int64_t c = 0; c < channels; ++c) store(load(from[c]) + load(more[c]), to + c);
      continue;
    }
    if (a.channels == channels) {
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c] = T{};
      for (int64_t c = 0; c < a.channels; ++c) to[a.place[c]] = from[c];
    }
    for (int64_t c = 0; c < b.channels; ++c) {
      T* at = to + b.place[c];
      store(load(*at) + load(more[c]), at);
    }
  }
}

template <class T>
DCX_MULTIVERSION void add_plane(const T* a, const T* b, T* __restrict y, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) store(load(a[i]) + load(b[i]), y + i);
}

template <class T>
std::vector<int64_t> inverse(const Term<T>& term, int64_t channels) {
  std::vector<int64_t> from(channels, -1);
  for (int64_t c = 0; c < term.channels; ++c) from[term.place[c]] = c;
  return from;
}

// Planes of pixels: every plane of the sum is a copy, a sum, or zeros.
template <class T>
void add_planes(
    const Term<T>& a, const Term<T>& b, T* y, int64_t samples, int64_t channels, int64_t pixels) {
  const std::vector<int64_t> in_a = inverse(a, channels), in_b = inverse(b, channels);
  const int64_t grain = std::max<int64_t>(1, GRAIN / pixels);
  torch::stable::parallel_for(0, samples * channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / channels, c = plane % channels;
      const T* from = in_a[c] < 0 ? nullptr : a.data + n * a.stride + in_a[c] * pixels;
      const T* more = in_b[c] < 0 ? nullptr : b.data + n * b.stride + in_b[c] * pixels;
      T* to = y + plane * pixels;
      if (from && more) {
        add_plane(from, more, to, pixels);
      } else if (from || more) {
        std::copy_n(from ? from : more, pixels, to);
      } else {
        std::fill_n(to, pixels, T{});
      }
    }
  });
}

void check_term(const Tensor& t, const Tensor& idx, int64_t channels) {
  check_input(t, NAME);
  DCX_CHECK(idx.is_cpu() && idx.scalar_type() == ScalarType::Long && idx.dim() == 1 &&
                idx.is_contiguous() && idx.size(0) == t.size(1),
            NAME, "an int64 index for every channel", "another tensor");
  const int64_t* place = data<int64_t>(idx);
  for (int64_t c = 0; c < t.size(1); ++c) {
    DCX_CHECK(place[c] >= 0 && place[c] < channels, NAME, "places below num_out", place[c]);
  }
}

bool channels_last(const Tensor& t) {
  return t.dim() == 4 && t.stride(1) == 1 && t.size(2) * t.size(3) != 1;
}

Tensor union_add(
    const Tensor& first, const Tensor& second, const Tensor& first_idx, const Tensor& second_idx,
    int64_t num_out) {
  check_term(first, first_idx, num_out);
  check_term(second, second_idx, num_out);
  bool same = first.scalar_type() == second.scalar_type() && first.dim() == second.dim();
  for (int64_t dim = 0; same && dim < first.dim(); ++dim) {
    same = dim == 1 || first.size(dim) == second.size(dim);
  }
  DCX_CHECK(same, NAME, "terms of one dtype that differ in channels only", "others");
  using torch::headeronly::MemoryFormat;
  const bool last = channels_last(first) || channels_last(second);
  const auto [a, a_layout] = in_order(first, last);
  const auto [b, b_layout] = in_order(second, last);
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
  shape[1] = num_out;
  const Tensor y = torch::stable::empty(
      {shape.data(), shape.size()}, a.scalar_type(), std::nullopt, a.device(), std::nullopt,
      last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const auto [samples, channels, pixels] = sizes_of(y);
  const bool rows = last || pixels == 1;
  by_type(a, [&, &a = a, &b = b, &a_layout = a_layout, &b_layout = b_layout, samples = samples,
              pixels = pixels](auto type) {
    using T = decltype(type);
    const int64_t step = rows ? 1 : pixels;
    const Term<T> one{data<T>(a), a_layout.padded * step, data<int64_t>(first_idx), a.size(1)};
    const Term<T> two{data<T>(b), b_layout.padded * step, data<int64_t>(second_idx), b.size(1)};
    T* to = mutable_data<T>(y);
    if (!rows) return add_planes(one, two, to, samples, num_out, pixels);
    const int64_t grain = std::max<int64_t>(1, GRAIN / num_out);
    const bool swap = two.channels > one.channels;  // the wider one is copied
    torch::stable::parallel_for(0, samples * pixels, grain, [&](int64_t begin, int64_t end) {
      add_rows(swap ? two : one, swap ? one : two, to, begin, end, num_out);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) { m.impl("union_add", TORCH_BOX(&union_add)); }

}  // namespace dcx
