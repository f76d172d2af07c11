// Blocks of a tensor (N, k, ...) in which every column belongs to one channel.
//
// Rows of columns: a row is a pixel (NHWC) or a sample (NCHW); several short rows make a long one.
// Planes: large planes of NCHW are cut into rows of `LANES` columns instead.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/batch_norm_layout.h"
#include "cpu/batch_norm_loops.h"

namespace dcx::norm {

constexpr int64_t ROWS = 16;    // of a block: what is added up in the tensor's precision
constexpr int64_t TILE = 512;   // columns of a block: sums and parameters stay in the L1 cache
constexpr int64_t LANES = 32;   // columns of a block of a plane
constexpr int64_t PLANE = 256;  // pixels from which on planes are cut into rows
constexpr int64_t CHUNK = 32768;  // entries that are worth a task

struct Block {
  int64_t outer, inner;  // row and column; or sample and entry of the sample
  int64_t rows, cols;
  int64_t column;  // where its columns' parameters and sums begin
};

class Blocks {
 public:
  // `joined`: no tensor has padded channels, so that rows may be joined.
  Blocks(Sizes sizes, bool last, bool joined, bool by_sample);

  int64_t columns() const { return columns_; }
  int64_t chunks() const { return parts_ * slices_; }
  int64_t parts() const { return parts_; }

  // Call `work` on every block of a chunk: a part of the rows, a slice of the channels.
  template <class Work>
  void each(int64_t chunk, const Work& work) const {
    const int64_t part = chunk / slices_, slice = chunk % slices_;
    const int64_t begin = outer_ * part / parts_, end = outer_ * (part + 1) / parts_;
    if (planes_) {
      const auto [first, past] = channels(slice);
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = first; c < past; ++c) plane(n, c, work);
      }
      return;
    }
    const auto [left, right] = own_columns(slice);
    for (int64_t r = begin; r < end; r += ROWS) {
      const int64_t rows = std::min(ROWS, end - r);
      for (int64_t c = left; c < right; c += TILE) {
        work(Block{r, c, rows, std::min(TILE, right - c), c});
      }
    }
  }

  // The block's part of a tensor.
  template <class T>
  Grid<T> grid(T* data, Layout layout, const Block& block) const {
    const int64_t stride =
        planes_ || !last_ ? layout.padded * sizes_.pixels : layout.padded * group_;
    T* at = data + block.outer * stride + block.inner;
    return {at, planes_ ? LANES : stride};
  }

  // Give every column its channel's number.
  template <class A>
  std::vector<A> spread(const std::vector<double>& vector) const {
    std::vector<A> wide(columns_);
    int64_t at = 0;
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t c = 0; c < sizes_.channels; ++c) {
        std::fill_n(wide.data() + at, run_, static_cast<A>(vector[c]));
        at += run_;
      }
    }
    return wide;
  }

  // Sums by block (`COUNT` rows of A) become sums by part and channel: [parts, COUNT, channels].
  template <int64_t COUNT, class A, class Work>
  std::vector<double> sums(const Work& work) const {
    const int64_t size = sizes_.channels;
    std::vector<double> all(parts_ * COUNT * size);
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> wide(COUNT * columns_);
      A own[COUNT][TILE];
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t slice = chunk % slices_;
        const auto [left, right] = own_columns(slice);
        for (int64_t i = 0; i < COUNT; ++i) {
          double* sum = wide.data() + i * columns_;
          std::fill(sum + left, sum + right, 0.0);
        }
        each(chunk, [&](const Block& block) {
          work(block, own);
          for (int64_t i = 0; i < COUNT; ++i) {
            accumulate(own[i], block.cols, wide.data() + i * columns_ + block.column);
          }
        });
        double* to = all.data() + chunk / slices_ * COUNT * size;
        for (int64_t i = 0; i < COUNT; ++i) fold(wide.data() + i * columns_, slice, to + i * size);
      }
    });
    return all;
  }

  // Zero the channels of a buffer that the tensor does not have.
  template <class T>
  void clear_padding(T* data, Layout layout) const {
    const int64_t run = layout.last ? 1 : sizes_.pixels;
    const int64_t count = sizes_.samples * (layout.last ? sizes_.pixels : 1);
    const int64_t used = sizes_.channels * run, all = layout.padded * run;
    if (used == all) return;
    const int64_t grain = std::max<int64_t>(1, CHUNK / (all - used));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memset(static_cast<void*>(data + row * all + used), 0, (all - used) * sizeof(T));
      }
    });
  }

 private:
  std::pair<int64_t, int64_t> channels(int64_t slice) const {
    return {sizes_.channels * slice / slices_, sizes_.channels * (slice + 1) / slices_};
  }

  std::pair<int64_t, int64_t> own_columns(int64_t slice) const {
    if (slices_ == 1) return {0, columns_};
    const auto [first, past] = channels(slice);
    return {first * run_, past * run_};
  }

  template <class Work>
  void plane(int64_t n, int64_t c, const Work& work) const {
    const int64_t whole = sizes_.pixels / LANES, from = c * sizes_.pixels;
    for (int64_t r = 0; r < whole; r += ROWS) {
      const int64_t rows = std::min(ROWS, whole - r);
      work(Block{n, from + r * LANES, rows, LANES, c * LANES});
    }
    const int64_t rest = sizes_.pixels % LANES;
    if (rest) work(Block{n, from + whole * LANES, 1, rest, c * LANES});
  }

  // Add up the columns of every channel.
  void fold(const double* wide, int64_t slice, double* to) const {
    const auto [first, past] = channels(slice);
    if (run_ == 1) {  // channels side by side
      std::copy(wide + first, wide + past, to + first);
      for (int64_t g = 1; g < group_; ++g) {
        const double* row = wide + g * sizes_.channels;
        for (int64_t c = first; c < past; ++c) to[c] += row[c];
      }
      return;
    }
    for (int64_t c = first; c < past; ++c) {  // rows are joined only where run_ is 1
      const double* run = wide + c * run_;
      double sum[4] = {0, 0, 0, 0};  // independent, for speed
      int64_t i = 0;
      for (; i + 4 <= run_; i += 4) {
        for (int64_t j = 0; j < 4; ++j) sum[j] += run[i + j];
      }
      for (; i < run_; ++i) sum[0] += run[i];
      to[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }

  Sizes sizes_;
  bool last_, planes_;
  int64_t group_;    // rows that are joined to one
  int64_t run_;      // columns side by side of one channel
  int64_t columns_;  // group_ * channels * run_
  int64_t outer_;    // rows, or samples
  int64_t parts_, slices_;
};

}  // namespace dcx::norm
