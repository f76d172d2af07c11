// A convolution with a gate, in evaluation: the gate, its winners, and their channels alone,
// boosted while they are in the cache. One call a layer: for one image, calls outweigh their work.
//
// y = factor * ReLU(conv + beta std - mean), factor = g / std: eq. 5 with batch norm folded in.
// Folding takes less time than finding out whether it was done before.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "cpu/gate.h"
#include "cpu/sample_conv.h"

namespace dcx {

namespace {

using torch::headeronly::ScalarType;
constexpr const char* NAME = "gated_conv2d";

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

void check_vector(const char* what, const Tensor& vector, const Tensor& x, int64_t size) {
  DCX_CHECK(vector.is_cpu() && vector.scalar_type() == x.scalar_type() && vector.is_contiguous() &&
                vector.dim() == 1 && vector.size(0) == size,
            NAME, words(what, " of ", size, " values, of x's dtype"), vector.numel());
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> gated(const Tensor& x, const Lists& in_idx,
                                         const Tensor& weight, const Tensor& phi, const Tensor& rho,
                                         const Tensor& beta, const Tensor& mean, const Tensor& var,
                                         double eps, int64_t k, const Window& window, bool relu) {
  const int64_t N = x.size(0), K = weight.size(0), C = weight.size(1), c = x.size(1);
  const int64_t pixels = x.size(2) * x.size(3);
  const std::array<int64_t, 4> sizes{N, k, output_pixels(window, 0, x.size(2)),
                                     output_pixels(window, 1, x.size(3))};
  const std::array<int64_t, 2> gates{N, K}, lists{N, k < K ? k : 0};
  const Tensor y = torch::stable::new_empty(x, {sizes.data(), 4});
  const Tensor g = torch::stable::new_empty(x, {gates.data(), 2});
  const Tensor idx = torch::stable::new_empty(x, {lists.data(), 2}, ScalarType::Long);

  std::vector<T> deviation(K), bias(K), factor(N * k);
  for (int64_t i = 0; i < K; ++i) {
    deviation[i] = std::sqrt(data_of<T>(var)[i] + static_cast<T>(eps));
    bias[i] = data_of<T>(beta)[i] * deviation[i] - data_of<T>(mean)[i];
  }
  T* g_data = static_cast<T*>(g.mutable_data_ptr());
  int64_t* idx_data = static_cast<int64_t*>(idx.mutable_data_ptr());
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> means(c), s(C);
    std::vector<Present<T>> present(C);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* channels = channels_of(in_idx, n);
      mean_abs(means.data(), data_of<T>(x) + n * c * pixels, c, pixels);
      std::fill(present.begin(), present.end(), 0);
      for (int64_t j = 0; j < c; ++j) {
        const int64_t channel = channels ? channels[j] : j;
        s[channel] = means[j], present[channel] = -1;
      }
      T* values = g_data + n * K;
      open_gates(values, data_of<T>(phi), data_of<T>(rho), s.data(), present.data(), K, C);
      int64_t* winners = k < K ? idx_data + n * k : nullptr;
      if (winners) k_winners(winners, values, K, k);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t channel = winners ? winners[i] : i;
        factor[n * k + i] = values[channel] / deviation[channel];
      }
    }
  });
  const Lists out_idx = k < K ? Lists(idx) : std::nullopt;
  convolve_forward(y, x, weight, in_idx, out_idx, window,
                   Gate<T>{bias.data(), factor.data(), relu});
  return {y, idx, g};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_conv2d(Tensor x, std::optional<Tensor> in_idx,
                                                Tensor weight, Tensor phi, Tensor rho, Tensor beta,
                                                Tensor mean, Tensor var, double eps, int64_t k,
                                                Sizes stride, Sizes padding, Sizes dilation,
                                                bool relu) {
  DCX_CHECK(x.is_cpu() && weight.is_cpu() && x.dim() == 4 && weight.dim() == 4, NAME,
            "4-D tensors on the CPU", words(x.dim(), "-D and ", weight.dim(), "-D"));
  const ScalarType type = x.scalar_type();
  DCX_CHECK(type == ScalarType::Float || type == ScalarType::Double, NAME, "float32 or float64",
            torch::headeronly::toString(type));
  DCX_CHECK(weight.scalar_type() == type, NAME, "one dtype", "several");
  DCX_CHECK(x.is_contiguous(), NAME, "contiguous x", "another");
  const int64_t K = weight.size(0), C = weight.size(1);
  const Window window = check_window(NAME, weight, stride, padding, dilation);
  check_channels(NAME, "in_idx", in_idx, x.size(0), x.size(1), C);
  DCX_CHECK(phi.is_cpu() && phi.scalar_type() == type && phi.is_contiguous() && phi.dim() == 2 &&
                phi.size(0) == K && phi.size(1) == C,
            NAME, words("phi of ", K, " times ", C, " values, of x's dtype"), phi.numel());
  check_vector("rho", rho, x, K);
  check_vector("beta", beta, x, K);
  check_vector("mean", mean, x, K);
  check_vector("var", var, x, K);
  DCX_CHECK(k >= 1 && k <= K, NAME, words("k in [1, ", K, "]"), k);
  return type == ScalarType::Float ? gated<float>(x, in_idx, weight, phi, rho, beta, mean, var, eps,
                                                  k, window, relu)
                                   : gated<double>(x, in_idx, weight, phi, rho, beta, mean, var,
                                                   eps, k, window, relu);
}

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) { m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d)); }

}  // namespace dcx
