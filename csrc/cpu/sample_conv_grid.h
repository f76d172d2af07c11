// Which pixels of an image the pixels of a result read: the geometry of a convolution, no channels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/sample_conv.h"

namespace dcx {

// Pixel (i, j) of a grid reads, for tap t, a copy of the image with borders, of which each row is
// `phases` rows of `width`: column b lies in phase b % phases. So the pixels of one row of the grid
// read neighbours, whatever the stride.
struct Grid {
  int64_t rows, columns;
  int64_t first_row, first_column;     // of the image, above and left of all that is read
  int64_t row_step;                    // rows of the image from a row of the grid to the next
  int64_t span;                        // rows of the image that one row of the grid reads
  int64_t phases, width;
  int64_t result_row, result_column;   // where pixel (0, 0) is written
  int64_t result_step[2];
  std::vector<ptrdiff_t> source, weight;  // offsets of every tap

  int64_t pitch() const { return phases * width; }
  int64_t taps() const { return source.size(); }
};

inline Grid forward_grid(const Window& w, int64_t P, int64_t Q, int64_t weight_row,
                         int64_t weight_column) {
  const int64_t phases = w.stride[1];
  const int64_t read = (Q - 1) * phases + (w.S - 1) * w.dilation[1] + 1;
  Grid grid{P, Q, -w.padding[0], -w.padding[1], w.stride[0], (w.R - 1) * w.dilation[0] + 1,
            phases, (read + phases - 1) / phases, 0, 0, {1, 1}, {}, {}};
  for (int64_t r = 0; r < w.R; ++r) {
    for (int64_t s = 0; s < w.S; ++s) {
      const int64_t column = s * w.dilation[1];
      const int64_t within = column % phases * grid.width + column / phases;
      grid.source.push_back(r * w.dilation[0] * grid.pitch() + within);
      grid.weight.push_back(r * weight_row + s * weight_column);
    }
  }
  return grid;
}

// The taps that meet pixels `residue` modulo the stride, and by how much they are off.
struct Meeting {
  std::vector<int64_t> tap, shift;
  int64_t least, most;
};

inline Meeting meeting(const Window& w, int axis, int64_t residue) {
  Meeting met{{}, {}, 0, 0};
  for (int64_t tap = 0; tap < (axis ? w.S : w.R); ++tap) {
    const int64_t distance = residue + w.padding[axis] - tap * w.dilation[axis];
    if (distance % w.stride[axis]) continue;
    met.tap.push_back(tap);
    met.shift.push_back(distance / w.stride[axis]);
  }
  if (!met.tap.empty()) {
    met.least = *std::min_element(met.shift.begin(), met.shift.end());
    met.most = *std::max_element(met.shift.begin(), met.shift.end());
  }
  return met;
}

inline std::vector<Grid> backward_grids(const Window& w, int64_t H, int64_t W, int64_t weight_row,
                                        int64_t weight_column) {
  std::vector<Grid> grids;
  for (int64_t a = 0; a < w.stride[0]; ++a) {
    for (int64_t b = 0; b < w.stride[1]; ++b) {
      const Meeting v = meeting(w, 0, a), h = meeting(w, 1, b);
      const int64_t rows = (H - a + w.stride[0] - 1) / w.stride[0];
      const int64_t columns = (W - b + w.stride[1] - 1) / w.stride[1];
      Grid grid{rows, columns, v.least, h.least, 1, v.most - v.least + 1, 1,
                columns + h.most - h.least, a, b, {w.stride[0], w.stride[1]}, {}, {}};
      for (size_t r = 0; r < v.tap.size(); ++r) {
        for (size_t s = 0; s < h.tap.size(); ++s) {
          grid.source.push_back((v.shift[r] - v.least) * grid.pitch() + h.shift[s] - h.least);
          grid.weight.push_back(v.tap[r] * weight_row + h.tap[s] * weight_column);
        }
      }
      grids.push_back(std::move(grid));
    }
  }
  return grids;
}

// Copy rows [top, top + height) of the image, zeros where it has none: (channels, height, pitch).
template <typename T>
void add_border(T* bordered, const Image<const T>& image, int64_t channels, const Grid& grid,
                int64_t top, int64_t height) {
  const int64_t pitch = grid.pitch(), plane = height * pitch, left = grid.first_column;
  const bool channels_last = image.channel == 1 && image.column != 1;
  const int64_t outer = channels_last ? 1 : channels, inner = channels_last ? channels : 1;
  std::fill_n(bordered, channels * plane, T(0));
  for (int64_t c = 0; c < outer; ++c) {
    for (int64_t i = std::max(int64_t(0), -top); i < std::min(height, image.height - top); ++i) {
      const T* from = image.data + c * image.channel + (top + i) * image.row;
      for (int64_t phase = 0; phase < grid.phases; ++phase) {
        T* to = bordered + c * plane + i * pitch + phase * grid.width;
        // places [begin, end) of this phase are in the image, the first of them at `column`
        const int64_t before = -(left + phase), room = image.width + before;
        const int64_t begin = before > 0 ? (before + grid.phases - 1) / grid.phases : 0;
        const int64_t past = room > 0 ? (room + grid.phases - 1) / grid.phases : 0;
        const int64_t end = std::min(grid.width, past);
        const int64_t step = grid.phases * image.column;
        const T* pixel = from + (begin * grid.phases - before) * image.column;
        if (step == 1 && begin < end) {
          std::copy(pixel, pixel + (end - begin), to + begin);
          continue;
        }
        for (int64_t place = begin; place < end; ++place, pixel += step) {
          for (int64_t d = 0; d < inner; ++d) to[place + d * plane] = pixel[d];
        }
      }
    }
  }
}

}  // namespace dcx
