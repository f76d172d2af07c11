// The inner loops of batch norm: blocks of rows of columns, every column with its own parameters.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/floats.h"
#include "cpu/vectors.h"

namespace dcx::norm {

// A block of `rows` x `cols` entries of a tensor, `stride` entries from row to row.
template <class T>
struct Grid {
  T* at;
  int64_t stride;
  T* row(int64_t r) const { return at + r * stride; }
};

// Sums of (x - pivot) and its square, by column.
template <class T, class A>
DCX_MULTIVERSION void sum_moments(
    Grid<const T> x, int64_t rows, int64_t cols, const A* __restrict pivot, A* __restrict sum,
    A* __restrict square) {
  for (int64_t c = 0; c < cols; ++c) sum[c] = square[c] = 0;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {  // four at a time: sums are loaded and stored less often
    const T *x0 = x.row(r), *x1 = x.row(r + 1), *x2 = x.row(r + 2), *x3 = x.row(r + 3);
    for (int64_t c = 0; c < cols; ++c) {
      const A d0 = load(x0[c]) - pivot[c], d1 = load(x1[c]) - pivot[c];
      const A d2 = load(x2[c]) - pivot[c], d3 = load(x3[c]) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < rows; ++r) {
    const T* x0 = x.row(r);
    for (int64_t c = 0; c < cols; ++c) {
      const A d = load(x0[c]) - pivot[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

// y = max((x - mean) scale + shift, least); NaN stays NaN.
template <class T, class A>
DCX_MULTIVERSION void normalise(
    Grid<const T> x, Grid<T> y, int64_t rows, int64_t cols, const A* __restrict mean,
    const A* __restrict scale, const A* __restrict shift, A least) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x.row(r);
    T* __restrict to = y.row(r);
    for (int64_t c = 0; c < cols; ++c) {
      const A value = (load(from[c]) - mean[c]) * scale[c] + shift[c];
      store(value < least ? least : value, to + c);
    }
  }
}

// The gradient before the ReLU: none where the output is not above 0; a NaN there lets it pass.
template <bool RELU, class T>
inline computed<T> unmasked(T dy, const T* y, int64_t c) {
  if constexpr (RELU) return load(y[c]) <= 0 ? computed<T>(0) : load(dy);
  return load(dy);
}

// Sums of dh and dh (x - mean), by column.
template <bool RELU, class T, class A>
DCX_MULTIVERSION void sum_gradients(
    Grid<const T> dy, Grid<const T> x, Grid<const T> y, int64_t rows, int64_t cols,
    const A* __restrict mean, A* __restrict sum, A* __restrict product) {
  for (int64_t c = 0; c < cols; ++c) sum[c] = product[c] = 0;
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const T *dy0 = dy.row(r), *x0 = x.row(r), *y0 = y.row(r);
    const T *dy1 = dy.row(r + 1), *x1 = x.row(r + 1), *y1 = y.row(r + 1);
    for (int64_t c = 0; c < cols; ++c) {
      const A g0 = unmasked<RELU>(dy0[c], y0, c), g1 = unmasked<RELU>(dy1[c], y1, c);
      sum[c] += g0 + g1;
      product[c] += g0 * (load(x0[c]) - mean[c]) + g1 * (load(x1[c]) - mean[c]);
    }
  }
  for (; r < rows; ++r) {
    const T *dy0 = dy.row(r), *x0 = x.row(r), *y0 = y.row(r);
    for (int64_t c = 0; c < cols; ++c) {
      const A g = unmasked<RELU>(dy0[c], y0, c);
      sum[c] += g;
      product[c] += g * (load(x0[c]) - mean[c]);
    }
  }
}

// Sums of dh h, by column. Behind a ReLU y is h wherever dh is not 0, and more exact than what the
// rounded mean gives, unless y was rounded to 16 bits.
template <bool RELU, class T, class A>
DCX_MULTIVERSION void sum_saliency(
    Grid<const T> dy, Grid<const T> x, Grid<const T> y, int64_t rows, int64_t cols,
    const A* __restrict mean, const A* __restrict scale, const A* __restrict shift,
    A* __restrict sum) {
  constexpr bool EXACT = RELU && std::is_same_v<T, A>;
  for (int64_t c = 0; c < cols; ++c) sum[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T *dy0 = dy.row(r), *x0 = x.row(r), *y0 = y.row(r);
    for (int64_t c = 0; c < cols; ++c) {
      const A h = EXACT ? load(y0[c]) : (load(x0[c]) - mean[c]) * scale[c] + shift[c];
      sum[c] += unmasked<RELU>(dy0[c], y0, c) * h;
    }
  }
}

// dx = dh scale + (x - mean) slope + shift; of frozen statistics the first term only.
template <bool RELU, bool FROZEN, class T, class A>
DCX_MULTIVERSION void differentiate(
    Grid<const T> dy, Grid<const T> x, Grid<const T> y, Grid<T> dx, int64_t rows, int64_t cols,
    const A* __restrict mean, const A* __restrict scale, const A* __restrict slope,
    const A* __restrict shift) {
  for (int64_t r = 0; r < rows; ++r) {
    const T *dy0 = dy.row(r), *x0 = x.row(r), *y0 = y.row(r);
    T* __restrict to = dx.row(r);
    for (int64_t c = 0; c < cols; ++c) {
      const A g = unmasked<RELU>(dy0[c], y0, c) * scale[c];
      store(FROZEN ? g : g + ((load(x0[c]) - mean[c]) * slope[c] + shift[c]), to + c);
    }
  }
}

template <class A>
DCX_MULTIVERSION void accumulate(const A* from, int64_t count, double* __restrict to) {
  for (int64_t c = 0; c < count; ++c) to[c] += from[c];
}

}  // namespace dcx::norm
