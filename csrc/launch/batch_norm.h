// Launch arithmetic of batch norm: how blocks cover a dense tensor (N, k, ...). No CUDA in here.
//
// Sizes alone decide, never the GPU: sums depend on the order in which they are added.
//
// Legend: N samples, k channels, P pixels of a sample; a vector is 16 bytes, a position one (n, p).
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace dcx::norm {

constexpr int kThreads = 256;
constexpr int64_t kReducingBlocks = 768;  // 132 multiprocessors hold 3 each, twice
constexpr int64_t kWritingBlocks = 2048;
constexpr int64_t kLeastColumns = 64;
constexpr int64_t kLeastRows = 8;  // for a thread: sums of a block are added up, too

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor as rows of columns. A row is `times` periods (k numbers, or k planes) in one, so that it
// is whole vectors, whatever k is, and a thread keeps its columns, hence its channels.
struct Rows {
  int32_t columns;  // of a row: times * period
  int32_t times;
  int32_t width;    // vectors of a row that a block has side by side
  int32_t across;   // blocks that make up a row
  int32_t rows;     // that a block has at a time: width * rows threads
  int64_t block;    // periods of a tile: whole rows, but for the last of a set
  int64_t tiles;    // of a set
  int64_t sets;     // samples, if sums of each are wanted; else 1
};

// `span` periods in each of `sets`, in vectors of `vector` elements.
inline Rows cover_rows(int64_t sets, int64_t span, int64_t period, int64_t vector, int64_t blocks) {
  int64_t times = vector / std::gcd(vector, period);
  while (times * period < kLeastColumns) times *= 2;
  const int64_t vectors = times * period / vector;
  const int64_t across = ceil_div(vectors, kThreads), width = ceil_div(vectors, across);
  const int64_t rows = kThreads / width;
  const int64_t least = times * rows * kLeastRows;  // periods
  const int64_t wanted = std::max<int64_t>(1, blocks / (sets * across));
  const int64_t tiles = std::min(wanted, ceil_div(span, least));
  const int64_t block = ceil_div(ceil_div(span, tiles), times * rows) * times * rows;
  return {static_cast<int32_t>(times * period), static_cast<int32_t>(times),
          static_cast<int32_t>(width), static_cast<int32_t>(across), static_cast<int32_t>(rows),
          block, ceil_div(span, block), sets};
}

// Partial results that a tile leaves for a channel: a block adds up the periods of its row only if
// it has the whole row.
inline int64_t leaves(const Rows& rows) { return rows.across > 1 ? rows.times : 1; }

inline int64_t blocks_of(const Rows& rows) { return rows.sets * rows.tiles * rows.across; }

// A tensor (N, k, P) as planes: a block has some channels, of each some samples at a time, of each
// plane some vectors at a time.
struct Planes {
  int32_t lanes;     // threads of a plane
  int32_t together;  // planes of a channel at a time, of as many samples
  int32_t channels;  // of a block: channels * together * lanes threads
  int32_t across;    // blocks that make up all channels
  int64_t samples;   // of a tile
  int64_t pixels;    // of a tile
  int64_t sample_tiles, pixel_tiles;
};

inline Planes cover_planes(int64_t samples, int64_t channels, int64_t pixels, int64_t vector,
                           bool per_sample) {
  constexpr int64_t kEach = 4;  // vectors of a plane for a thread, loaded at once
  const int64_t vectors = ceil_div(pixels, vector);
  const int64_t each = kEach * ceil_div(vectors, kEach * kThreads);
  const int64_t lanes = ceil_div(vectors, each);
  // short planes share sectors of memory with those beside them
  const int64_t beside = std::min(channels, std::max<int64_t>(1, kLeastColumns / pixels));
  const int64_t most = std::max<int64_t>(1, kThreads / (lanes * beside));
  const int64_t together = per_sample ? 1 : std::min(samples, most);
  const int64_t own = std::clamp<int64_t>(kThreads / (lanes * together), 1, channels);
  const int64_t across = ceil_div(channels, own);
  const int64_t wanted = std::max<int64_t>(1, kReducingBlocks / across);
  const int64_t turns = ceil_div(samples, together);  // of the samples of a channel
  const int64_t sample_tiles = per_sample ? samples : std::min(wanted, turns);
  const int64_t of_tile = ceil_div(turns, sample_tiles) * together;
  const int64_t rest = std::max<int64_t>(1, wanted / sample_tiles);
  const int64_t least = vector * lanes * kEach;
  const int64_t pixel_tiles = std::min(rest, ceil_div(pixels, least));
  const int64_t of_plane = ceil_div(ceil_div(pixels, pixel_tiles), least) * least;
  return {static_cast<int32_t>(lanes), static_cast<int32_t>(together), static_cast<int32_t>(own),
          static_cast<int32_t>(across), of_tile, of_plane, ceil_div(samples, of_tile),
          ceil_div(pixels, of_plane)};
}

inline int64_t blocks_of(const Planes& planes) {
  return planes.sample_tiles * planes.pixel_tiles * planes.across;
}

// The kernels that add up partial results: lanes of threads beside each other for each number.
struct Finish {
  int32_t lanes, items;  // items numbers a block, lanes * items threads
  int64_t blocks;
};

inline Finish cover_finish(int64_t parts, int64_t numbers) {
  int64_t lanes = 1;
  while (lanes < 32 && lanes * 2 <= parts) lanes *= 2;
  const int64_t items = kThreads / lanes;
  return {static_cast<int32_t>(lanes), static_cast<int32_t>(items), ceil_div(numbers, items)};
}

}  // namespace dcx::norm
