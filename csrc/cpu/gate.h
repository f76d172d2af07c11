// The gate of one sample: what it looks at, how far channels are open, and which of them win.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace dcx {

// -1 for a channel that exists, else 0: as wide as a value, so that a vector can be chosen by it.
template <typename T>
using Present = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename T>
inline T sum_of(const typename Lanes<T>::Vector& vector) {
  T sum = 0;
  for (size_t i = 0; i < VECTOR_BYTES / sizeof(T); ++i) sum += vector[i];
  return sum;
}

// means (channels,) of |x| of x (channels, pixels).
template <typename T>
DCX_MULTIVERSION void mean_abs(T* means, const T* x, int64_t channels, int64_t pixels) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t width = VECTOR_BYTES / sizeof(T);
  for (int64_t c = 0; c < channels; ++c, x += pixels) {
    Vector sums[4] = {};
    int64_t p = 0;
    for (; p + 4 * width <= pixels; p += 4 * width) {
      for (int64_t v = 0; v < 4; ++v) {
        Vector values;
        std::memcpy(&values, x + p + v * width, sizeof(Vector));
        sums[v] += values < 0 ? -values : values;
      }
    }
    T sum = sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; p < pixels; ++p) sum += std::abs(x[p]);
    means[c] = sum / static_cast<T>(pixels);
  }
}

// g = ReLU(s phi + rho), eq. 8; phi (K, C). What s and phi hold of an absent channel is not used.
template <typename T>
DCX_MULTIVERSION void open_gates(T* g, const T* phi, const T* rho, const T* s,
                                 const Present<T>* present, int64_t K, int64_t C) {
  using Vector = typename Lanes<T>::Vector;
  typedef Present<T> Mask __attribute__((vector_size(VECTOR_BYTES)));
  constexpr int64_t width = VECTOR_BYTES / sizeof(T);
  for (int64_t k = 0; k < K; ++k, phi += C) {
    Vector sums = {};
    int64_t c = 0;
    for (; c + width <= C; c += width) {
      Vector weights, values;
      Mask there;
      std::memcpy(&weights, phi + c, sizeof(Vector));
      std::memcpy(&values, s + c, sizeof(Vector));
      std::memcpy(&there, present + c, sizeof(Mask));
      sums += there ? weights * values : Vector{};
    }
    T sum = sum_of<T>(sums);
    for (; c < C; ++c) sum += present[c] ? phi[c] * s[c] : T(0);
    sum += rho[k];
    g[k] = sum < 0 ? T(0) : sum;  // NaN stays
  }
}

// The k winners of g (K,), ascending: ties go to the lower channel, NaN counts as -inf.
template <typename T>
inline void k_winners(int64_t* winners, const T* g, int64_t K, int64_t k) {
  thread_local std::vector<T> numbers, sorted;
  numbers.resize(K);
  for (int64_t i = 0; i < K; ++i) {
    numbers[i] = std::isnan(g[i]) ? -std::numeric_limits<T>::infinity() : g[i];
  }
  sorted = numbers;
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<T>());
  const T least = sorted[k - 1];
  int64_t ties = k - std::count_if(numbers.begin(), numbers.end(), [&](T v) { return v > least; });
  for (int64_t i = 0; i < K; ++i) {
    if (numbers[i] > least || (numbers[i] == least && ties-- > 0)) *winners++ = i;
  }
}

}  // namespace dcx
