// Batch norm (+ ReLU), forward: one pass for the statistics, one to normalise.
//
// Legend: N samples, k channels, K channels of the running statistics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/batch_norm.h"
#include "cpu/batch_norm_blocks.h"

namespace dcx {

namespace {

using namespace norm;
using Vector = std::vector<double>;

constexpr const char* NAME = "batch_norm_fwd";

struct Statistics {
  Vector mean, var;  // var: biased in training
};

// Something near the mean of every channel, so that squares of differences from it are small.
template <class T>
Vector pivots(const T* x, Sizes sizes, Layout layout) {
  constexpr int64_t SAMPLES = 4;
  const auto [count, channels, pixels] = sizes;
  Vector pivot(channels, 0.0);
  const int64_t step = layout.last ? 1 : pixels;
  for (int64_t i = 0; i < SAMPLES; ++i) {
    const int64_t sample = count * i / SAMPLES, pixel = pixels * (2 * i + 1) / (2 * SAMPLES);
    const T* from =
        x + sample * layout.padded * pixels + pixel * (layout.last ? layout.padded : 1);
    for (int64_t c = 0; c < channels; ++c) pivot[c] += load(from[c * step]);
  }
  for (double& value : pivot) {
    value = std::isfinite(value) ? static_cast<computed<T>>(value / SAMPLES) : 0;
  }
  return pivot;
}

template <class T>
Statistics measure(const T* x, Sizes sizes, Layout layout, const Blocks& blocks) {
  using A = computed<T>;
  const Vector pivot = pivots(x, sizes, layout);
  const std::vector<A> wide = blocks.spread<A>(pivot);
  const Vector sums = blocks.sums<2, A>([&](const Block& block, A(*own)[TILE]) {
    sum_moments(blocks.grid(x, layout, block), block.rows, block.cols, wide.data() + block.column,
                own[0], own[1]);
  });
  const double count = static_cast<double>(sizes.samples * sizes.pixels);
  Statistics found{Vector(sizes.channels), Vector(sizes.channels)};
  for (int64_t c = 0; c < sizes.channels; ++c) {
    double sum = 0, square = 0;
    for (int64_t part = 0; part < blocks.parts(); ++part) {
      sum += sums[2 * part * sizes.channels + c];
      square += sums[(2 * part + 1) * sizes.channels + c];
    }
    const double off = sum / count, var = square / count - off * off;
    found.mean[c] = pivot[c] + off;
    found.var[c] = var < 0 ? 0 : var;  // NaN stays
  }
  return found;
}

void check_running(
    const Tensor& running, const Tensor& x, const std::optional<Tensor>& active) {
  DCX_CHECK(running.is_cpu() && running.scalar_type() == statistics_type(x) &&
                running.dim() == 1 && running.is_contiguous(),
            NAME, "contiguous running statistics (K,), float32 or, of float64, float64",
            "another tensor");
  if (!active) {
    DCX_CHECK(running.size(0) == x.size(1), NAME, x.size(1), running.size(0));
    return;
  }
  DCX_CHECK(active->is_cpu() && active->scalar_type() == ScalarType::Long && active->dim() == 1 &&
                active->is_contiguous() && active->size(0) == x.size(1),
            NAME, "active int64, an index for every channel", "another tensor");
  const int64_t *at = data<int64_t>(*active), count = x.size(1), most = running.size(0);
  for (int64_t c = 0; c < count; ++c) {
    DCX_CHECK(at[c] >= 0 && at[c] < most, NAME, "active channels that exist", at[c]);
  }
}

template <class A>
void update(
    const Tensor& running, const int64_t* active, const Vector& values, double momentum,
    double factor) {
  A* to = mutable_data<A>(running);
  for (size_t c = 0; c < values.size(); ++c) {
    A& entry = to[active ? active[c] : static_cast<int64_t>(c)];
    entry = static_cast<A>(momentum * factor * values[c] + (1 - momentum) * entry);
  }
}

template <class A>
Vector entries(const Tensor& running, const int64_t* active, int64_t count) {
  const A* from = data<A>(running);
  Vector values(count);
  for (int64_t c = 0; c < count; ++c) values[c] = from[active ? active[c] : c];
  return values;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& active, bool training, double momentum, double eps, bool relu) {
  check_input(input, NAME);
  DCX_CHECK(running_mean.has_value() == running_var.has_value(), NAME, "both statistics or none",
            "one");
  DCX_CHECK(training || running_mean, NAME, "running statistics in evaluation", "none");
  if (running_mean) {
    check_running(*running_mean, input, active);
    check_running(*running_var, input, active);
  }
  const auto [x, layout] = recognise(input);
  const Sizes sizes = sizes_of(x);
  const int64_t channels = sizes.channels;
  const Vector scale = read(weight, channels, 1, NAME), shift = read(bias, channels, 0, NAME);
  const int64_t* at = active ? data<int64_t>(*active) : nullptr;
  const Blocks blocks(sizes, layout.last, layout.padded == channels, false);
  const std::array<int64_t, 1> size{channels};
  const Tensor y = norm::empty_like(x, layout);
  const Tensor mean = torch::stable::new_empty(x, {size.data(), 1}, statistics_type(x));
  const Tensor invstd = torch::stable::new_empty(x, {size.data(), 1}, statistics_type(x));
  by_type(x, [&, &x = x, &layout = layout](auto type) {
    using T = decltype(type);
    using A = computed<T>;
    const T* from = data<T>(x);
    Statistics used;
    if (training) {
      used = measure(from, sizes, layout, blocks);
      if (running_mean) {
        const double count = static_cast<double>(sizes.samples * sizes.pixels);
        update<A>(*running_mean, at, used.mean, momentum, 1);
        update<A>(*running_var, at, used.var, momentum, count / (count - 1));
      }
    } else {
      used = {entries<A>(*running_mean, at, channels), entries<A>(*running_var, at, channels)};
    }
    Vector inverse(channels), factor(channels), offset(channels);
    for (int64_t c = 0; c < channels; ++c) {
      inverse[c] = 1 / std::sqrt(used.var[c] + eps);
      factor[c] = inverse[c] * scale[c];
      // the part of the mean that its rounding loses
      offset[c] = shift[c] - (used.mean[c] - static_cast<A>(used.mean[c])) * factor[c];
    }
    write(used.mean, mutable_data<A>(mean));
    write(inverse, mutable_data<A>(invstd));
    const std::vector<A> means = blocks.spread<A>(used.mean), factors = blocks.spread<A>(factor);
    const std::vector<A> offsets = blocks.spread<A>(offset);
    const A least = relu ? 0 : -std::numeric_limits<A>::infinity();
    T* to = mutable_data<T>(y);
    torch::stable::parallel_for(0, blocks.chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = end - 1; chunk >= begin; --chunk) {  // what was read last is near
        blocks.each(chunk, [&](const Block& block) {
          normalise(blocks.grid(from, layout, block), blocks.grid(to, layout, block), block.rows,
                    block.cols, means.data() + block.column, factors.data() + block.column,
                    offsets.data() + block.column, least);
        });
      }
    });
    blocks.clear_padding(to, layout);
  });
  return {y, mean, invstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_norm_fwd));
}

}  // namespace dcx
