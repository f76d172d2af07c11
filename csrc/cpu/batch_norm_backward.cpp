// Batch norm (+ ReLU), backward: one pass for the sums, one for dx. Saliency falls out of the sums.
//
// With h the output before the ReLU: sum dh h = weight sum dh xhat + bias sum dh. Over the pixels of
// one sample these two may all but cancel, so that dh h is added up itself.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/batch_norm.h"
#include "cpu/batch_norm_blocks.h"

namespace dcx {

namespace {

using namespace norm;
using Vector = std::vector<double>;

constexpr const char* NAME = "batch_norm_bwd";

// A tensor's data, and how it lies.
template <class T>
struct Source {
  T* data;
  Layout layout;
};

template <class T>
struct Tensors {
  Source<const T> dy, x, y;
  Source<T> dx;
};

// What h is made of, by column: (x - mean) scale + shift.
template <class A>
struct Affine {
  std::vector<A> mean, scale, shift;
};

// Sums of dh, dh (x - mean) and, by sample, dh h: [parts, 2 or 3, channels].
template <bool RELU, bool BY_SAMPLE, class T, class A>
Vector reduce(const Tensors<T>& t, const Blocks& blocks, const Affine<A>& h) {
  return blocks.sums<BY_SAMPLE ? 3 : 2, A>([&](const Block& block, A(*own)[TILE]) {
    const auto at = [&](Source<const T> s) { return blocks.grid(s.data, s.layout, block); };
    const A* mean = h.mean.data() + block.column;
    sum_gradients<RELU>(at(t.dy), at(t.x), at(t.y), block.rows, block.cols, mean, own[0], own[1]);
    if constexpr (BY_SAMPLE) {
      sum_saliency<RELU>(at(t.dy), at(t.x), at(t.y), block.rows, block.cols, mean,
                         h.scale.data() + block.column, h.shift.data() + block.column, own[2]);
    }
  });
}

template <bool BY_SAMPLE, class T, class A>
Vector reduce(const Tensors<T>& t, const Blocks& blocks, const Affine<A>& h, bool relu) {
  return relu ? reduce<true, BY_SAMPLE>(t, blocks, h) : reduce<false, BY_SAMPLE>(t, blocks, h);
}

template <class A>
struct Slopes {
  std::vector<A> slope, shift;
};

template <bool RELU, bool FROZEN, class T, class A>
void derive(
    const Tensors<T>& t, const Blocks& blocks, const Affine<A>& h, const Slopes<A>& by) {
  torch::stable::parallel_for(0, blocks.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {  // what was read last is near
      blocks.each(chunk, [&](const Block& block) {
        const auto at = [&](auto s) { return blocks.grid(s.data, s.layout, block); };
        const int64_t c = block.column;
        differentiate<RELU, FROZEN>(
            at(t.dy), at(t.x), at(t.y), at(t.dx), block.rows, block.cols, h.mean.data() + c,
            h.scale.data() + c, by.slope.data() + c, by.shift.data() + c);
      });
    }
  });
  blocks.clear_padding(t.dx.data, t.dx.layout);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(
    const Tensor& gradient, const Tensor& input, const std::optional<Tensor>& output,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
    const Tensor& invstd, bool training, bool per_sample) {
  check_input(input, NAME);
  check_like(gradient, input, NAME, "dy like x");
  if (output) check_like(*output, input, NAME, "y like x");
  const auto [x, layout] = recognise(input);
  const auto [dy, dy_layout] = agree(gradient, x, layout);
  const auto [y, y_layout] = output ? agree(*output, x, layout) : std::pair{x, layout};
  const Sizes sizes = sizes_of(x);
  const int64_t channels = sizes.channels;
  const Vector means = read(mean, channels, 0, NAME), inverse = read(invstd, channels, 1, NAME);
  const Vector scale = read(weight, channels, 1, NAME), shift = read(bias, channels, 0, NAME);
  const bool joined = layout.padded == channels && dy_layout.padded == channels &&
                      y_layout.padded == channels;
  const Blocks blocks(sizes, layout.last, joined, per_sample);
  const ScalarType kind = statistics_type(x);
  const std::array<int64_t, 2> size{sizes.samples, channels};
  const Tensor dx = norm::empty_like(x, layout);
  const Tensor dweight = torch::stable::new_empty(x, {size.data() + 1, 1}, kind);
  const Tensor dbias = torch::stable::new_empty(x, {size.data() + 1, 1}, kind);
  const Tensor saliency = per_sample ? torch::stable::new_empty(x, {size.data(), 2}, kind)
                                     : torch::stable::new_empty(x, {size.data() + 1, 1}, kind);
  by_type(x, [&, &x = x, &y = y, &dy = dy, &layout = layout, &y_layout = y_layout,
              &dy_layout = dy_layout](auto type) {
    using T = decltype(type);
    using A = computed<T>;
    const Tensors<T> t{{data<T>(dy), dy_layout},
                       {data<T>(x), layout},
                       {data<T>(y), y_layout},
                       {mutable_data<T>(dx), layout}};
    Vector by(channels);
    for (int64_t c = 0; c < channels; ++c) by[c] = inverse[c] * scale[c];
    const Affine<A> h{blocks.spread<A>(means), blocks.spread<A>(by), blocks.spread<A>(shift)};
    const Vector sums = per_sample ? reduce<true>(t, blocks, h, output.has_value())
                                   : reduce<false>(t, blocks, h, output.has_value());
    Vector sum(channels), product(channels), signed_sum(saliency.numel());
    const int64_t step = (per_sample ? 3 : 2) * channels;
    for (int64_t part = 0; part < blocks.parts(); ++part) {
      const double* own = sums.data() + part * step;
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += own[c];
        product[c] += own[channels + c] * inverse[c];
      }
      if (per_sample) std::copy_n(own + 2 * channels, channels, &signed_sum[part * channels]);
    }
    for (int64_t c = 0; c < channels && !per_sample; ++c) {
      signed_sum[c] = scale[c] * product[c] + shift[c] * sum[c];
    }
    write(product, mutable_data<A>(dweight));
    write(sum, mutable_data<A>(dbias));
    write(signed_sum, mutable_data<A>(saliency));
    const double count = static_cast<double>(sizes.samples * sizes.pixels);
    Vector slope(channels), offset(channels);
    for (int64_t c = 0; c < channels; ++c) {
      slope[c] = -by[c] * inverse[c] * product[c] / count;
      offset[c] = -by[c] * sum[c] / count;
    }
    const Slopes<A> slopes{blocks.spread<A>(slope), blocks.spread<A>(offset)};
    if (output && training) return derive<true, false>(t, blocks, h, slopes);
    if (output) return derive<true, true>(t, blocks, h, slopes);
    if (training) return derive<false, false>(t, blocks, h, slopes);
    derive<false, true>(t, blocks, h, slopes);
  });
  return {dx, dweight, dbias, saliency};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
}

}  // namespace dcx
