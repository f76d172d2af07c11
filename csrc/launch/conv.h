// Launch arithmetic of convolutions: which pixels and taps meet, tiles, splits. No CUDA in here.
//
// N batch, K out and C in channels, H W input, P Q output, R S filter. "Source" is what a pass
// reads (x forward, dy for dgrad), "output" what it writes.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace dcx::conv {

// Along one axis both forward and dgrad are sums over taps t of a source pixel and a filter row,
//     source pixel(i, t) = i * src_step + src_first + t * tap_move,
//     filter row(t) = tap_first + t * tap_step,
// for every output pixel i * out_step + out_first.
struct Axis {
  int32_t size;  // output pixels of this map
  int32_t out_step, out_first;
  int32_t src_size, src_step, src_first;
  int32_t taps, tap_move, tap_first, tap_step;
};

// One axis of a window that slides over an image.
struct Window {
  int64_t size, taps, stride, padding, dilation;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output pixels; less than one where the filter is larger than the padded image.
inline int64_t output_pixels(const Window& w) {
  const int64_t room = w.size + 2 * w.padding - w.dilation * (w.taps - 1) - 1;
  return room < 0 ? 0 : room / w.stride + 1;
}

inline Axis fwd_axis(const Window& w) {
  return {static_cast<int32_t>(output_pixels(w)), 1, 0,
          static_cast<int32_t>(w.size), static_cast<int32_t>(w.stride),
          static_cast<int32_t>(-w.padding), static_cast<int32_t>(w.taps),
          static_cast<int32_t>(w.dilation), 0, 1};
}

// The gradient of a strided convolution reaches an input pixel through some of the filter's rows
// only; which ones, depends on the pixel modulo the stride. One map for each remainder that any row
// reaches: no tap is computed in vain.
inline std::vector<Axis> dgrad_axes(const Window& w) {
  const int64_t step = w.stride / std::gcd(w.stride, w.dilation);
  const auto outputs = static_cast<int32_t>(output_pixels(w));
  std::vector<Axis> axes;
  for (int64_t first = 0; first < w.stride && first < w.size; ++first) {
    int64_t reaching = 0, tap_first = 0;
    for (int64_t r = w.taps - 1; r >= 0; --r) {
      if ((first + w.padding - r * w.dilation) % w.stride == 0) {
        ++reaching;
        tap_first = r;
      }
    }
    if (reaching == 0) continue;
    axes.push_back({static_cast<int32_t>(ceil_div(w.size - first, w.stride)),
                    static_cast<int32_t>(w.stride), static_cast<int32_t>(first), outputs, 1,
                    static_cast<int32_t>((first + w.padding - tap_first * w.dilation) / w.stride),
                    static_cast<int32_t>(reaching),
                    static_cast<int32_t>(-(step * w.dilation / w.stride)),
                    static_cast<int32_t>(tap_first), static_cast<int32_t>(step)});
  }
  return axes;
}

// --- tiles --------------------------------------------------------------------------------------

enum class Tile { k128x128, k128x64, k64x64 };  // pixels x channels; of wgrad K x (C R S)

struct TileSize {
  int64_t rows, columns;
};

inline TileSize size_of(Tile tile) {
  switch (tile) {
    case Tile::k128x128: return {128, 128};
    case Tile::k128x64: return {128, 64};
    default: return {64, 64};
  }
}

inline int64_t tiles(Tile tile, int64_t rows, int64_t columns) {
  const TileSize size = size_of(tile);
  return ceil_div(rows, size.rows) * ceil_div(columns, size.columns);
}

// The largest tile that fills every multiprocessor and wastes no half of itself: a guess, nobody
// has measured it.
inline Tile choose_tile(int64_t problems, int64_t rows, int64_t columns, int64_t processors) {
  if (columns > 64 && problems * tiles(Tile::k128x128, rows, columns) >= processors) {
    const int64_t waste = ceil_div(columns, 128) * 128 - columns;
    if (waste < 64) return Tile::k128x128;
  }
  if (problems * tiles(Tile::k128x64, rows, columns) >= processors) return Tile::k128x64;
  return Tile::k64x64;
}

// --- weight gradient ----------------------------------------------------------------------------

// How the pixels of a weight gradient are split; the sums of the splits are added up in order.
struct Splits {
  Tile tile;
  int64_t splits, pixels;  // of every split but the last
};

// `pixels` N P Q, `rows` k, `columns` c R S. Enough splits for two blocks a multiprocessor, each of
// 256 pixels at least; a multiple of 32 pixels, what one stage of the kernel reads.
inline Splits choose_splits(int64_t pixels, int64_t rows, int64_t columns, int64_t processors) {
  const bool large = rows > 64 && columns > 64;
  const Tile tile = large ? Tile::k128x128 : Tile::k64x64;
  const int64_t blocks = tiles(tile, rows, columns);
  const int64_t wanted = ceil_div(2 * processors, blocks);
  const int64_t most = pixels < 512 ? 1 : pixels / 256;
  const int64_t splits = wanted < most ? wanted : most;
  const int64_t each = ceil_div(ceil_div(pixels, splits), 32) * 32;
  return {tile, ceil_div(pixels, each), each};
}

}  // namespace dcx::conv
