// Weight gradient as a product of matrices: rows are output channels (k), columns taps and input
// channels (R S c), the sum runs over the pixels of one split. No atomics: splits are summed later.
#pragma once

#include "cuda/channel_conv2d.h"
#include "cuda/conv_tile.cuh"
#include "cuda/launch.cuh"

namespace dcx {

// A stage: for every pixel a row of kWidth channels; chunks are swapped so that what a warp reads
// at once lies in different banks, 8 rows of 16-bit elements or 4 of fp32.
template <typename T, int kWidth>
__device__ inline int wide_chunk_at(int pixel, int chunk) {
  constexpr int kBytes = sizeof(typename T::Bits);
  const int swap = kBytes == 2 ? pixel & 7 : (pixel & 3) << 1;
  return pixel * kWidth * kBytes + ((chunk ^ swap) << 4);
}

// Load the fragments of 16 channels from `first` on and the 32 bytes of pixels of `step`: registers
// (lower, upper channels) x (lower, upper pixels), channels first.
template <typename T, int kWidth>
__device__ inline void load_channels(uint32_t (&to)[4], const unsigned char* stage, int first,
                                     int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(typename T::Bits) == 2) {
    const int pixel = step * 16 + lane / 16 * 8 + lane % 8;
    load_matrices_transposed(to,
                             stage + wide_chunk_at<T, kWidth>(pixel, first / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int pixel = step * 8 + w / 2 * 4 + lane % 4, channel = first + w % 2 * 8 + lane / 4;
      const int place = wide_chunk_at<T, kWidth>(pixel, channel / 4) + channel % 4 * 4;
      to[w] = round_tf32(*reinterpret_cast<const uint32_t*>(stage + place));
    }
  }
}

template <typename T, typename Shape>
__device__ inline void multiply_pixels(Sums<Shape>& sums, const unsigned char* dy,
                                       const unsigned char* x) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
  const int first_column = warp % Shape::kWarpsAcross * Shape::kWarpColumns;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Shape::kSumsDown][4], b[Shape::kSumsAcross / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::kSumsDown; ++i) {
      load_channels<T, Shape::kRows>(a[i], dy, first_row + i * 16, step);
    }
#pragma unroll
    for (int j = 0; j < Shape::kSumsAcross / 2; ++j) {
      load_channels<T, Shape::kColumns>(b[j], x, first_column + j * 16, step);
    }
#pragma unroll
    for (int i = 0; i < Shape::kSumsDown; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kSumsAcross; ++j) {
        multiply_add(T(), sums[i][j], a[i], b[j / 2][j % 2], b[j / 2][j % 2 + 2]);
      }
    }
  }
}

// Fetches stages of pixels in order. A thread brings the same chunk of several pixels.
template <typename T, typename Shape, bool kVector>
struct PixelFetcher {
  using Bits = typename T::Bits;
  static constexpr int kElements = 16 / sizeof(Bits);
  static constexpr int kPixels = kElements * kChunksOfRow;  // of a stage
  static constexpr int kWidth = Shape::kRows;
  static constexpr int kChunks = kWidth / kElements;
  static constexpr int kPass = Shape::kThreads / kChunks;
  static constexpr int kCount = kPixels / kPass;
  static constexpr int kColumns = kVector ? 1 : kElements;  // a chunk is of one tap, or may not be
  static_assert(Shape::kRows == Shape::kColumns, "both operands are fetched alike");

  const ConvWgradParams& p;
  int64_t next, end;  // pixels
  int pixel, chunk;
  int row;                                   // first output channel of the chunk
  int64_t column[kColumns];                  // offsets of its columns in x
  int moved_y[kColumns], moved_x[kColumns];  // of their taps
  uint4 dy_held[kCount], x_held[kCount];

  __device__ PixelFetcher(const ConvWgradParams& params, int first_row, int first_column)
      : p(params) {
    const int thread = static_cast<int>(threadIdx.x);
    // neighbouring threads read what is next to each other: channels, or pixels
    const bool across = kVector || p.x_c == 1;
    pixel = across ? thread / kChunks : thread % kPass;
    chunk = across ? thread % kChunks : thread / kPass;
    next = blockIdx.y * p.pixels_per_split;
    end = min(next + p.pixels_per_split, p.pixels);
    row = first_row + chunk * kElements;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      const int number = first_column + chunk * kElements + e;
      const int tap = number / p.c, channel = number % p.c;
      moved_y[e] = tap / p.taps_x * p.dilation_y;
      moved_x[e] = tap % p.taps_x * p.dilation_x;
      if (tap >= p.taps_y * p.taps_x) moved_y[e] = 1 << 30;  // no such column
      column[e] = channel * p.x_c;
    }
  }

  __device__ bool done() const { return next >= end; }

  __device__ void start(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = pixel + i * kPass;
      const int64_t number = next + at;
      const bool real = number < end;
      const int low = static_cast<int>(real ? number : 0);
      const int q = low % p.Q, rest = low / p.Q;
      const int64_t n = rest / p.P;
      const int row_of_y = rest % p.P;
      const Bits* dy = static_cast<const Bits*>(p.dy) + n * p.dy_n + row_of_y * p.dy_y + q * p.dy_x;
      const Bits* x = static_cast<const Bits*>(p.x) + n * p.x_n;
      const int y0 = row_of_y * p.stride_y - p.padding_y, x0 = q * p.stride_x - p.padding_x;
      if constexpr (kVector) {
        const bool rows = real && row < p.k;
        copy_async_16(stage + wide_chunk_at<T, kWidth>(at, chunk), rows ? dy + row : p.dy, rows);
        const bool columns = real && inside(y0 + moved_y[0], x0 + moved_x[0]);
        const Bits* from =
            x + (y0 + moved_y[0]) * p.x_y + (x0 + moved_x[0]) * p.x_x + column[0];
        copy_async_16(stage + kPixels * kWidth * sizeof(Bits) + wide_chunk_at<T, kWidth>(at, chunk),
                      columns ? from : p.x, columns);
      } else {
        dy_held[i] = x_held[i] = {0, 0, 0, 0};
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          if (real && row + e < p.k) put(dy_held[i], e, dy[(row + e) * p.dy_c]);
          const int y_in = y0 + moved_y[e], x_in = x0 + moved_x[e];
          if (real && inside(y_in, x_in)) {
            put(x_held[i], e, x[y_in * p.x_y + x_in * p.x_x + column[e]]);
          }
        }
      }
    }
    next += kPixels;
  }

  __device__ bool inside(int y, int x) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
  }

  __device__ void store(unsigned char* stage) {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int place = wide_chunk_at<T, kWidth>(pixel + i * kPass, chunk);
        *reinterpret_cast<uint4*>(stage + place) = dy_held[i];
        *reinterpret_cast<uint4*>(stage + kPixels * kWidth * sizeof(Bits) + place) = x_held[i];
      }
    }
  }
};

// grid: (tiles of columns, then of rows; splits)
template <typename T, typename Shape, bool kVector>
__global__ void __launch_bounds__(Shape::kThreads)
    channel_conv2d_wgrad_kernel(const ConvWgradParams p, const int column_tiles) {
  unsigned char* shared = shared_memory();
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Shape::kColumns;
  const int first_row = static_cast<int>(blockIdx.x / column_tiles) * Shape::kRows;
  Sums<Shape> sums = {};
  PixelFetcher<T, Shape, kVector> fetcher(p, first_row, first_column);
  const int64_t pixels = fetcher.end - fetcher.next;
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (!fetcher.done()) {
      fetcher.start(shared + stage * Shape::kStageBytes);
      fetcher.store(shared + stage * Shape::kStageBytes);
    }
    copy_async_commit();
  }
  int read = 0, written = kStages - 1;
#pragma unroll 1
  for (int64_t left = pixels; left > 0; left -= fetcher.kPixels) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there, and nobody reads the one before any more
    unsigned char* next = shared + written * Shape::kStageBytes;
    const bool more = !fetcher.done();
    if (more) fetcher.start(next);
    copy_async_commit();
    const unsigned char* dy = shared + read * Shape::kStageBytes;
    multiply_pixels<T, Shape>(sums, dy, dy + Shape::kRows * 16 * kChunksOfRow);
    if (more) fetcher.store(next);
    read = read + 1 == kStages ? 0 : read + 1;
    written = written + 1 == kStages ? 0 : written + 1;
  }
  copy_async_wait<0>();
  const Place<Shape> place;
  const int columns = p.taps_y * p.taps_x * p.c;
  float* partial = p.partial + static_cast<int64_t>(blockIdx.y) * p.k * columns;
#pragma unroll
  for (int i = 0; i < Shape::kSumsDown * 2; ++i) {
    const int row = first_row + place.row + i * 8;
    if (row >= p.k) break;
#pragma unroll
    for (int j = 0; j < Shape::kSumsAcross * 2; ++j) {
      const int column = first_column + place.column + j / 2 * 8 + j % 2;
      if (column >= columns) break;
      partial[static_cast<int64_t>(row) * columns + column] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }
}

// --- launching ------------------------------------------------------------------------------------

template <typename T, typename Shape>
void launch_wgrad(const ConvWgradParams& p, cudaStream_t stream) {
  constexpr int64_t kElements = 16 / sizeof(typename T::Bits);
  const int64_t columns = static_cast<int64_t>(p.taps_y) * p.taps_x * p.c;
  const auto column_tiles = static_cast<int>(conv::ceil_div(columns, Shape::kColumns));
  const int64_t blocks = column_tiles * conv::ceil_div(p.k, Shape::kRows);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.splits));
  const int64_t together = p.k | p.c | p.dy_n | p.dy_y | p.dy_x | p.x_n | p.x_y | p.x_x;
  const bool vector = p.dy_c == 1 && p.x_c == 1 && together % kElements == 0 &&
                      reinterpret_cast<uintptr_t>(p.dy) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  if (vector) {
    DCX_LAUNCH((channel_conv2d_wgrad_kernel<T, Shape, true>), grid, Shape::kThreads,
               Shape::kSharedBytes, stream, p, column_tiles);
  } else {
    DCX_LAUNCH((channel_conv2d_wgrad_kernel<T, Shape, false>), grid, Shape::kThreads,
               Shape::kSharedBytes, stream, p, column_tiles);
  }
}

template <typename T>
void channel_conv2d_wgrad_of(const ConvWgradParams& params, conv::Tile tile, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (tile == conv::Tile::k128x128) return launch_wgrad<T, Large>(params, on);
  launch_wgrad<T, Small>(params, on);
}

}  // namespace dcx
