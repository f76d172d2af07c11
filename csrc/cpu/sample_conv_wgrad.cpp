// Gradient of the weight of a per-sample convolution, summed over samples into the full filter.
//
// For each sample and tap one product of matrices: dy (active out channels x pixels) times x
// (pixels x active in channels). x is copied once into blocks of as many channels as a tile is
// wide, with borders, so that every tap reads it where it lies; dy is read in place.
// A thread owns out channels and takes the samples in order: the sums are the same for any number
// of threads.

#include "cpu/sample_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace dcx {

namespace {

constexpr int64_t BLOCK_PIXELS = 128;     // of dy and x in the L1 cache
constexpr int64_t CHUNK_BYTES = 8 << 20;  // of copies of x

struct Sum {
  int64_t samples, K, C, k, c, P, Q;
  Window window;
  int64_t height, width;  // of an image with borders

  template <typename T>
  int64_t blocks() const {
    return (c + TILE_COLUMNS<T> - 1) / TILE_COLUMNS<T>;
  }
  template <typename T>
  int64_t block_size() const {
    return height * width * TILE_COLUMNS<T>;
  }
};

// (blocks, height, width, TILE_COLUMNS), zeros in the border and behind the last channel
template <typename T>
void copy_image(T* to, const Image<const T>& x, const Sum& sum) {
  constexpr int64_t lanes = TILE_COLUMNS<T>;
  const int64_t up = sum.window.padding[0], left = sum.window.padding[1];
  const int64_t rows = std::min(x.height, sum.height - up);
  const int64_t columns = std::min(x.width, sum.width - left);
  for (int64_t first = 0; first < sum.c; first += lanes, to += sum.block_size<T>()) {
    const int64_t count = std::min(lanes, sum.c - first);
    std::fill_n(to, sum.block_size<T>(), T(0));
    for (int64_t i = 0; i < rows; ++i) {
      T* row = to + ((i + up) * sum.width + left) * lanes;
      const T* from = x.data + first * x.channel + i * x.row;
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t c = 0; c < count; ++c) {
          row[j * lanes + c] = from[j * x.column + c * x.channel];
        }
      }
    }
  }
}

// sums [tap][row][column] of up to TILE_ROWS out channels and one block of in channels.
template <typename T>
DCX_MULTIVERSION void correlate(T* sums, const T* const* rows, int64_t num_rows, const T* image,
                                const ptrdiff_t* dy_at, const ptrdiff_t* x_at, int64_t pixels,
                                const ptrdiff_t* tap_at, int64_t taps) {
  for (int64_t q = 0; q < pixels; q += BLOCK_PIXELS) {
    const int64_t depth = pixels - q < BLOCK_PIXELS ? pixels - q : BLOCK_PIXELS;
    for (int64_t t = 0; t < taps; ++t) {
      tile<T, true>(num_rows, sums + t * TILE_SIZE<T>, rows, dy_at + q, image + tap_at[t], x_at + q,
                    depth);
    }
  }
}

// dw of out channels [first, last), samples [start, stop); their images begin at `images`.
template <typename T>
void add_samples(T* dw, const Tensor& dy, const T* images, const Lists& in_idx,
                 const Lists& out_idx, const Sum& sum, int64_t start, int64_t stop, int64_t first,
                 int64_t last) {
  constexpr int64_t lanes = TILE_COLUMNS<T>;
  const Window& w = sum.window;
  const int64_t taps = w.R * w.S, pixels = sum.P * sum.Q;
  std::vector<ptrdiff_t> dy_at, x_at, tap_at;
  for (int64_t i = 0; i < sum.P; ++i) {
    for (int64_t j = 0; j < sum.Q; ++j) {
      dy_at.push_back(i * dy.stride(2) + j * dy.stride(3));
      x_at.push_back((i * w.stride[0] * sum.width + j * w.stride[1]) * lanes);
    }
  }
  for (int64_t r = 0; r < w.R; ++r) {
    for (int64_t s = 0; s < w.S; ++s) {
      tap_at.push_back((r * w.dilation[0] * sum.width + s * w.dilation[1]) * lanes);
    }
  }
  std::vector<T> sums(taps * TILE_SIZE<T>);
  std::vector<const T*> rows;
  std::vector<int64_t> channels;
  const T* values = static_cast<const T*>(dy.const_data_ptr());
  for (int64_t n = start; n < stop; ++n) {
    const int64_t *in = channels_of(in_idx, n), *out = channels_of(out_idx, n);
    rows.clear(), channels.clear();
    for (int64_t i = 0; i < sum.k; ++i) {
      const int64_t channel = out ? out[i] : i;
      if (channel < first || channel >= last) continue;
      channels.push_back(channel);
      rows.push_back(values + n * dy.stride(0) + i * dy.stride(1));
    }
    const int64_t num_rows = rows.size();
    for (int64_t b = 0; b < sum.blocks<T>(); ++b, images += sum.block_size<T>()) {
      const int64_t count = std::min(lanes, sum.c - b * lanes);
      for (int64_t r = 0; r < row_panels(num_rows); ++r) {
        const int64_t from = panel_start(num_rows, r), to = panel_start(num_rows, r + 1);
        std::fill(sums.begin(), sums.end(), T(0));
        correlate<T>(sums.data(), rows.data() + from, to - from, images, dy_at.data(), x_at.data(),
                     pixels, tap_at.data(), taps);
        for (int64_t i = from; i < to; ++i) {
          for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t j = b * lanes + lane;
            T* pair = dw + (channels[i] * sum.C + (in ? in[j] : j)) * taps;
            const T* each = sums.data() + (i - from) * lanes + lane;
            for (int64_t t = 0; t < taps; ++t) pair[t] += each[t * TILE_SIZE<T>];
          }
        }
      }
    }
  }
}

// Bounds of `parts` ranges of out channels in which about as many samples are active.
std::vector<int64_t> shares(const Lists& out_idx, const Sum& sum, int64_t start, int64_t stop,
                            int64_t parts) {
  std::vector<int64_t> active(sum.K, out_idx ? 0 : stop - start), bounds{0};
  for (int64_t n = start; out_idx && n < stop; ++n) {
    for (int64_t i = 0; i < sum.k; ++i) ++active[channels_of(out_idx, n)[i]];
  }
  int64_t seen = 0;
  for (int64_t channel = 0; channel < sum.K; ++channel) {
    seen += active[channel];
    const int64_t share = bounds.size() * (stop - start) * sum.k / parts;
    if (seen >= share && static_cast<int64_t>(bounds.size()) < parts) bounds.push_back(channel + 1);
  }
  bounds.push_back(sum.K);
  return bounds;
}

template <typename T>
void wgrad(Tensor& dw, const Tensor& dy, const Tensor& x, const Lists& in_idx, const Lists& out_idx,
           const Sum& sum) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = sum.blocks<T>() * sum.block_size<T>();
  const int64_t fitting = CHUNK_BYTES / (size * static_cast<int64_t>(sizeof(T)));
  const int64_t chunk = std::min(sum.samples, std::max(threads, fitting));
  const std::unique_ptr<T[]> images(new T[chunk * size]);
  const T* values = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(dw.mutable_data_ptr());
  for (int64_t start = 0; start < sum.samples; start += chunk) {
    const int64_t stop = std::min(sum.samples, start + chunk);
    torch::stable::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        copy_image<T>(images.get() + (n - start) * size, image_of<const T>(x, n, values), sum);
      }
    });
    const std::vector<int64_t> bounds = shares(out_idx, sum, start, stop, threads);
    const int64_t parts = bounds.size() - 1;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        add_samples<T>(out, dy, images.get(), in_idx, out_idx, sum, start, stop, bounds[part],
                       bounds[part + 1]);
      }
    });
  }
}

}  // namespace

void sample_conv2d_wgrad(Tensor dw, Tensor dy, Tensor x, Lists in_idx, Lists out_idx, Sizes stride,
                         Sizes padding, Sizes dilation) {
  const char* name = "sample_conv2d_wgrad";
  const Window window =
      check_sample_conv(name, x, dw, dy, in_idx, out_idx, stride, padding, dilation);
  DCX_CHECK(dw.is_contiguous(), name, "dw contiguous", "another");
  if (x.numel() == 0 || dy.numel() == 0) return;
  Sum sum{x.size(0), dw.size(0), dw.size(1), dy.size(1), x.size(1), dy.size(2), dy.size(3),
          window, 0, 0};
  sum.height = (sum.P - 1) * window.stride[0] + (window.R - 1) * window.dilation[0] + 1;
  sum.width = (sum.Q - 1) * window.stride[1] + (window.S - 1) * window.dilation[1] + 1;
  if (x.scalar_type() == torch::headeronly::ScalarType::Float) {
    wgrad<float>(dw, dy, x, in_idx, out_idx, sum);
  } else {
    wgrad<double>(dw, dy, x, in_idx, out_idx, sum);
  }
}

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("sample_conv2d_wgrad", TORCH_BOX(&sample_conv2d_wgrad));
}

}  // namespace dcx
