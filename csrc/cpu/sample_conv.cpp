// Per-sample convolution, forward and gradient of x: one product of matrices for each sample,
// weights (active out channels x (active in channels, taps)) times patches ((.., taps) x pixels).
//
// The weights are read where they lie in the full filter, through pointers to rows and a list of
// offsets: this is the gather. Patches are copied into panels as wide as a tile, a block of
// channels and pixels at a time, from an image with borders, so that no pixel needs a check.
// The gradient of x is the same product with the channels' roles exchanged, once for each residue
// of the pixels modulo the stride: the taps that meet such pixels are the same for all of them.

#include "cpu/sample_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>

#include "cpu/gemm.h"
#include "cpu/sample_conv_grid.h"
#include "cpu/vectors.h"

namespace dcx {

namespace {

// Depth (channels times taps) and panels of a block: the patches fit the L2 cache, the weights of
// a tile L1.
constexpr int64_t BLOCK_DEPTH = 288;
constexpr int64_t BLOCK_PANELS = 16;
constexpr int64_t BLOCK_SUMS = 2048;  // panels times rows

// The full filter as the left matrix; null lists: all channels.
template <typename T>
struct Filter {
  const T* data;
  int64_t row, depth;  // strides
  const int64_t* rows;
  const int64_t* depths;
};

// Memory that a thread keeps: fresh memory costs more than what is done in it.
template <typename T>
struct Scratch {
  std::vector<T> image, patches, sums;
  std::vector<const T*> rows;
  std::vector<ptrdiff_t> offsets;
};

template <typename T>
T* at_least(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// One panel. Runs of neighbours in the image overlap: what is too long of one is overwritten by
// the next, and of the last by the next tap.
template <typename T, int64_t known_runs>
inline void pack_panel(T* patches, const T* image, const ptrdiff_t* source, int64_t taps,
                       int64_t plane, int64_t channels, const int64_t* lane, const int64_t* base,
                       int64_t runs) {
  constexpr int64_t columns = TILE_COLUMNS<T>;
  for (int64_t c = 0; c < channels; ++c, image += plane) {
    for (int64_t t = 0; t < taps; ++t, patches += columns) {
      const T* tap = image + source[t];
      for (int64_t r = 0; r < (known_runs ? known_runs : runs); ++r) {
        std::memcpy(patches + lane[r], tap + base[r], columns * sizeof(T));
      }
    }
  }
}

// patches [panel][channel][tap][column] of pixels start, start + 1, ... of the grid.
template <typename T>
DCX_MULTIVERSION void pack(T* patches, const T* image, const Grid& grid, int64_t plane,
                           int64_t channels, int64_t start, int64_t stop) {
  constexpr int64_t columns = TILE_COLUMNS<T>;
  const int64_t taps = grid.taps(), first_row = start / grid.columns;
  const ptrdiff_t* source = grid.source.data();
  for (int64_t from = start; from < stop; from += columns) {
    int64_t lane[columns], base[columns], runs = 0;
    for (int64_t pixel = from; pixel < std::min(from + columns, stop); ++runs) {
      const int64_t i = pixel / grid.columns, j = pixel % grid.columns;
      lane[runs] = pixel - from;
      base[runs] = (i - first_row) * grid.row_step * grid.pitch() + j;
      pixel += grid.columns - j;
    }
    switch (runs) {
      case 1: pack_panel<T, 1>(patches, image, source, taps, plane, channels, lane, base, 1); break;
      case 2: pack_panel<T, 2>(patches, image, source, taps, plane, channels, lane, base, 2); break;
      case 3: pack_panel<T, 3>(patches, image, source, taps, plane, channels, lane, base, 3); break;
      default: pack_panel<T, 0>(patches, image, source, taps, plane, channels, lane, base, runs);
    }
    patches += channels * taps * columns;
  }
}

// Skipped channels leave gaps that no prefetcher foresees: ask for the weights of a panel of rows
// while the one before is computed.
template <typename T>
inline void fetch(const T* const* rows, int64_t num_rows, const ptrdiff_t* offsets, int64_t depth,
                  int64_t panel) {
  if (panel >= row_panels(num_rows)) return;
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t to = panel_start(num_rows, panel + 1);
  for (int64_t i = panel_start(num_rows, panel); i < to; ++i) {
    ptrdiff_t last = -line;
    for (int64_t d = 0; d < depth; ++d) {
      if (offsets[d] - last < line && offsets[d] >= last) continue;
      last = offsets[d];
      __builtin_prefetch(rows[i] + last);
    }
  }
}

template <typename T>
DCX_MULTIVERSION void multiply(T* sums, const T* const* rows, int64_t num_rows,
                               const ptrdiff_t* offsets, const T* patches, int64_t panels,
                               int64_t depth) {
  for (int64_t r = 0; r < row_panels(num_rows); ++r) {
    const int64_t from = panel_start(num_rows, r), to = panel_start(num_rows, r + 1);
    fetch(rows, num_rows, offsets, depth, r + 1);
    for (int64_t p = 0; p < panels; ++p, sums += TILE_SIZE<T>) {
      const T* right = patches + p * depth * TILE_COLUMNS<T>;
      tile<T, false>(to - from, sums, rows + from, offsets, right, nullptr, depth);
    }
  }
}

// What a block of sums [row panel][panel][row][column] starts from.
template <typename T>
void start_sums(T* sums, const T* bias, const int64_t* channels, int64_t first, int64_t rows,
                int64_t panels) {
  for (int64_t r = 0; r < row_panels(rows); ++r) {
    const int64_t from = panel_start(rows, r), to = panel_start(rows, r + 1);
    for (int64_t p = 0; p < panels; ++p, sums += TILE_SIZE<T>) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t channel = channels ? channels[first + i] : first + i;
        std::fill_n(sums + (i - from) * TILE_COLUMNS<T>, TILE_COLUMNS<T>,
                    bias ? bias[channel] : T(0));
      }
    }
  }
}

// Sums while they are in the cache: factors are of the rows, relu comes first.
template <typename T>
DCX_MULTIVERSION void boost(T* sums, const T* factors, bool relu, int64_t rows, int64_t panels) {
  using Vector = typename Lanes<T>::Vector;
  for (int64_t r = 0; r < row_panels(rows); ++r) {
    const int64_t from = panel_start(rows, r), to = panel_start(rows, r + 1);
    for (int64_t p = 0; p < panels; ++p, sums += TILE_SIZE<T>) {
      for (int64_t i = from; i < to; ++i) {
        T* sum = sums + (i - from) * TILE_COLUMNS<T>;
        for (int64_t q = 0; q < TILE_COLUMNS<T>; q += VECTOR_BYTES / sizeof(T)) {
          Vector values;
          std::memcpy(&values, sum + q, sizeof(values));
          if (relu) values = values < 0 ? Vector{} : values;  // NaN stays
          values *= factors[i];
          std::memcpy(sum + q, &values, sizeof(values));
        }
      }
    }
  }
}

template <typename T>
void store_sums(const Image<T>& result, const T* sums, const Grid& grid, int64_t first,
                int64_t rows, int64_t start, int64_t stop) {
  constexpr int64_t columns = TILE_COLUMNS<T>;
  const bool in_order = grid.result_step[0] == 1 && grid.result_step[1] == 1 &&
                        result.column == 1 && result.row == grid.columns;
  for (int64_t r = 0; r < row_panels(rows); ++r) {
    const int64_t from = panel_start(rows, r), to = panel_start(rows, r + 1);
    for (int64_t pixel = start; pixel < stop; pixel += columns, sums += TILE_SIZE<T>) {
      ptrdiff_t at[columns];
      const int64_t count = std::min(columns, stop - pixel);
      if (in_order) {
        for (int64_t i = from; i < to; ++i) {
          T* channel = result.data + (first + i) * result.channel;
          std::copy_n(sums + (i - from) * columns, count, channel + pixel);
        }
        continue;
      }
      for (int64_t q = 0; q < count; ++q) {
        const int64_t i = (pixel + q) / grid.columns, j = (pixel + q) % grid.columns;
        at[q] = (grid.result_row + i * grid.result_step[0]) * result.row +
                (grid.result_column + j * grid.result_step[1]) * result.column;
      }
      for (int64_t i = from; i < to; ++i) {
        T* channel = result.data + (first + i) * result.channel;
        const T* sum = sums + (i - from) * columns;
        for (int64_t q = 0; q < count; ++q) channel[at[q]] = sum[q];
      }
    }
  }
}

// Channels [first, last) of the result, pixels [start, stop) of the grid.
template <typename T>
void convolve(const Image<T>& result, const Image<const T>& source, int64_t channels,
              const Filter<T>& filter, const Gate<T>& gate, const Grid& grid, int64_t first,
              int64_t last, int64_t start, int64_t stop) {
  thread_local Scratch<T> scratch;
  constexpr int64_t columns = TILE_COLUMNS<T>;
  const int64_t rows = last - first, taps = grid.taps();
  const T** row = at_least(scratch.rows, rows);
  for (int64_t i = 0; i < rows; ++i) {
    row[i] = filter.data + (filter.rows ? filter.rows[first + i] : first + i) * filter.row;
  }
  const int64_t most = std::clamp(BLOCK_SUMS / rows, int64_t(1), BLOCK_PANELS) * columns;
  const int64_t block = std::max(int64_t(1), BLOCK_DEPTH / std::max(int64_t(1), taps));
  for (int64_t from = start; from < stop; from += most) {
    const int64_t to = std::min(stop, from + most), panels = (to - from + columns - 1) / columns;
    T* sums = at_least(scratch.sums, row_panels(rows) * panels * TILE_SIZE<T>);
    start_sums(sums, gate.bias, filter.rows, first, rows, panels);
    for (int64_t c = 0; c < channels && taps > 0; c += block) {
      const int64_t count = std::min(block, channels - c), depth = count * taps;
      const int64_t top = from / grid.columns, bottom = (to - 1) / grid.columns;
      const int64_t height = (bottom - top) * grid.row_step + grid.span;
      const int64_t plane = height * grid.pitch();
      // a run is read as wide as a tile, so behind the last one there must be something to read
      T* image = at_least(scratch.image, count * plane + columns);
      Image<const T> part = source;
      part.data += c * source.channel;
      add_border(image, part, count, grid, grid.first_row + top * grid.row_step, height);
      T* patches = at_least(scratch.patches, panels * depth * columns + columns);
      pack<T>(patches, image, grid, plane, count, from, to);
      ptrdiff_t* offsets = at_least(scratch.offsets, depth);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = filter.depths ? filter.depths[c + i] : c + i;
        for (int64_t t = 0; t < taps; ++t) *offsets++ = channel * filter.depth + grid.weight[t];
      }
      multiply<T>(sums, row, rows, scratch.offsets.data(), patches, panels, depth);
    }
    if (gate.factor) boost<T>(sums, gate.factor + first, gate.relu, rows, panels);
    store_sums(result, sums, grid, first, rows, from, to);
  }
}

// All samples and grids; few samples are divided among the threads, along the longer side.
template <typename T>
void convolve_samples(const Tensor& result, const Tensor& source, const Tensor& weight,
                      const Gate<T>& gates, const Lists& row_lists, const Lists& depth_lists,
                      bool backward, const std::vector<Grid>& grids) {
  const int64_t samples = result.size(0), rows = result.size(1), channels = source.size(1);
  if (result.numel() == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = threads / std::gcd(threads, samples);
  const int64_t num_grids = grids.size();
  const T* in = static_cast<const T*>(source.const_data_ptr());
  const T* filters = static_cast<const T*>(weight.const_data_ptr());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / (parts * num_grids), part = task / num_grids % parts;
      const Grid& grid = grids[task % num_grids];
      const int64_t pixels = grid.rows * grid.columns;
      if (pixels == 0) continue;
      const Filter<T> filter{filters, weight.stride(backward), weight.stride(!backward),
                             channels_of(row_lists, sample), channels_of(depth_lists, sample)};
      const int64_t units[2] = {row_panels(rows), (pixels - 1) / TILE_COLUMNS<T> + 1};
      const bool by_pixels = pixels > rows;
      const int64_t from = units[by_pixels] * part / parts;
      const int64_t to = units[by_pixels] * (part + 1) / parts;
      if (from == to) continue;
      Gate<T> gate = gates;
      if (gate.factor) gate.factor += sample * rows;
      const Image<T> y = image_of<T>(result, sample, out);
      const Image<const T> x = image_of<const T>(source, sample, in);
      if (by_pixels) {
        const int64_t stop = std::min(pixels, to * TILE_COLUMNS<T>);
        convolve<T>(y, x, channels, filter, gate, grid, 0, rows, from * TILE_COLUMNS<T>, stop);
      } else {
        convolve<T>(y, x, channels, filter, gate, grid, panel_start(rows, from),
                    panel_start(rows, to), 0, pixels);
      }
    }
  };
  torch::stable::parallel_for(0, samples * parts * num_grids, 1, work);
}

}  // namespace

template <typename T>
void convolve_forward(const Tensor& y, const Tensor& x, const Tensor& weight, const Lists& in_idx,
                      const Lists& out_idx, const Window& window, const Gate<T>& gate) {
  const std::vector<Grid> grids{
      forward_grid(window, y.size(2), y.size(3), weight.stride(2), weight.stride(3))};
  convolve_samples<T>(y, x, weight, gate, out_idx, in_idx, false, grids);
}

template void convolve_forward(const Tensor&, const Tensor&, const Tensor&, const Lists&,
                               const Lists&, const Window&, const Gate<float>&);
template void convolve_forward(const Tensor&, const Tensor&, const Tensor&, const Lists&,
                               const Lists&, const Window&, const Gate<double>&);

void sample_conv2d_fwd(Tensor y, Tensor x, Tensor weight, std::optional<Tensor> bias, Lists in_idx,
                       Lists out_idx, Sizes stride, Sizes padding, Sizes dilation) {
  const char* name = "sample_conv2d_fwd";
  const Window window =
      check_sample_conv(name, x, weight, y, in_idx, out_idx, stride, padding, dilation);
  if (bias) {
    DCX_CHECK(bias->is_cpu() && bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
                  bias->dim() == 1 && bias->size(0) == weight.size(0),
              name, words("bias of ", weight.size(0), " values, of x's dtype"), bias->numel());
  }
  const void* data = bias ? bias->const_data_ptr() : nullptr;
  if (x.scalar_type() == torch::headeronly::ScalarType::Float) {
    const Gate<float> gate{static_cast<const float*>(data), nullptr, false};
    convolve_forward(y, x, weight, in_idx, out_idx, window, gate);
  } else {
    const Gate<double> gate{static_cast<const double*>(data), nullptr, false};
    convolve_forward(y, x, weight, in_idx, out_idx, window, gate);
  }
}

void sample_conv2d_dgrad(Tensor dx, Tensor dy, Tensor weight, Lists in_idx, Lists out_idx,
                         Sizes stride, Sizes padding, Sizes dilation) {
  const Window window = check_sample_conv("sample_conv2d_dgrad", dx, weight, dy, in_idx, out_idx,
                                          stride, padding, dilation);
  const std::vector<Grid> grids =
      backward_grids(window, dx.size(2), dx.size(3), weight.stride(2), weight.stride(3));
  if (dx.scalar_type() == torch::headeronly::ScalarType::Float) {
    convolve_samples<float>(dx, dy, weight, {}, in_idx, out_idx, true, grids);
  } else {
    convolve_samples<double>(dx, dy, weight, {}, in_idx, out_idx, true, grids);
  }
}

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("sample_conv2d_fwd", TORCH_BOX(&sample_conv2d_fwd));
  m.impl("sample_conv2d_dgrad", TORCH_BOX(&sample_conv2d_dgrad));
}

}  // namespace dcx
