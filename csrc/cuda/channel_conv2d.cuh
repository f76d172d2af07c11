// Implicit GEMM: forward and dgrad. Rows are output pixels, columns output channels; the sum runs
// over chunks of channels and, within them, taps, so that a chunk's weights stay in the L1 cache.
#pragma once

#include "cuda/channel_conv2d.h"
#include "cuda/conv_tile.cuh"
#include "cuda/launch.cuh"

namespace dcx {

// A stage in shared memory: rows of 64 bytes, whose chunks are swapped so that the 8 rows that
// ldmatrix reads at once lie in different banks.
__device__ inline int chunk_at(int row, int chunk) {
  return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}

// sums += rows (kRows x 64 bytes) times columns (kColumns x 64 bytes) transposed.
template <typename T, typename Shape>
__device__ inline void multiply_stage(Sums<Shape>& sums, const unsigned char* rows,
                                      const unsigned char* columns) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
  const int first_column = warp % Shape::kWarpsAcross * Shape::kWarpColumns;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Shape::kSumsDown][4], b[Shape::kSumsAcross / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::kSumsDown; ++i) {
      load_matrices(a[i], rows + chunk_at(first_row + i * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Shape::kSumsAcross / 2; ++j) {
      const int column = first_column + j * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b[j], columns + chunk_at(column, step * 2 + lane / 8 % 2));
    }
    if constexpr (sizeof(typename T::Bits) == 4) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int i = 0; i < Shape::kSumsDown; ++i) a[i][w] = round_tf32(a[i][w]);
#pragma unroll
        for (int j = 0; j < Shape::kSumsAcross / 2; ++j) b[j][w] = round_tf32(b[j][w]);
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kSumsDown; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kSumsAcross; ++j) {
        multiply_add(T(), sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// An output pixel, and where it reads from.
struct Pixel {
  int64_t n;
  int y, x;  // in the map
  __device__ Pixel(const ConvParams& p, int number) {
    x = number % p.x.size;
    const int rest = number / p.x.size;
    y = rest % p.y.size;
    n = static_cast<int64_t>(blockIdx.z) * p.images + rest / p.y.size;
  }
};

// Fetches stages in order. A thread brings the same chunk of several rows, of source and weight.
template <typename T, typename Shape, bool kVector>
struct Fetcher {
  using Bits = typename T::Bits;
  static constexpr int kElements = 16 / sizeof(Bits);         // of a chunk
  static constexpr int kDepth = kElements * kChunksOfRow;     // channels of a stage
  static constexpr int kPass = Shape::kThreads / kChunksOfRow;  // rows that all threads bring
  static constexpr int kSourceRows = Shape::kRows / kPass;
  static constexpr int kWeightRows = Shape::kColumns / kPass;

  const ConvParams& p;
  int channel = 0, tap_y = 0, tap_x = 0;  // of the next stage
  int source_row, source_chunk, weight_row, weight_chunk;
  const Bits* source[kSourceRows];
  int source_y[kSourceRows], source_x[kSourceRows];
  const Bits* weight[kWeightRows];    // null: no such output channel
  int64_t weight_channel[kElements];  // offsets of this chunk's channels; -1: no such channel
  uint4 source_held[kSourceRows], weight_held[kWeightRows];

  __device__ Fetcher(const ConvParams& params, int first_pixel, int first_column) : p(params) {
    const int thread = static_cast<int>(threadIdx.x);
    // neighbouring threads read what is next to each other: chunks of a row, or rows
    const bool across = kVector || p.source_c == 1;
    source_row = across ? thread / kChunksOfRow : thread % kPass;
    source_chunk = across ? thread % kChunksOfRow : thread / kPass;
    const bool weight_across = p.weight_source < p.weight_out;
    weight_row = weight_across ? thread / kChunksOfRow : thread % kPass;
    weight_chunk = weight_across ? thread % kChunksOfRow : thread / kPass;
    const int pixels = p.images * p.y.size * p.x.size;
#pragma unroll
    for (int i = 0; i < kSourceRows; ++i) {
      const int number = first_pixel + source_row + i * kPass;
      const Pixel pixel(p, number < pixels ? number : 0);
      source[i] = static_cast<const Bits*>(p.source) + pixel.n * p.source_n;
      source_y[i] = number < pixels ? pixel.y * p.y.src_step + p.y.src_first : -(1 << 30);
      source_x[i] = pixel.x * p.x.src_step + p.x.src_first;
    }
    const int64_t* list = p.out_list;
    if (list != nullptr) list += blockIdx.z * p.out_list_stride;
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      const int column = first_column + weight_row + i * kPass;
      weight[i] = nullptr;
      if (column < p.out_channels) {
        const int64_t listed = list != nullptr ? list[column] : column;
        weight[i] = static_cast<const Bits*>(p.weight) + listed * p.weight_out;
      }
    }
    look_up_channels();
  }

  __device__ void look_up_channels() {
    const int64_t* list = p.source_list;
    if (list != nullptr) list += blockIdx.z * p.source_list_stride;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int number = channel + weight_chunk * kElements + e;
      weight_channel[e] = -1;
      if (number < p.source_channels) {
        weight_channel[e] = (list != nullptr ? list[number] : number) * p.weight_source;
      }
    }
  }

  __device__ bool done() const { return channel >= p.source_channels; }

  // Start to bring the next stage; what goes through registers is there after `store`.
  __device__ void start(unsigned char* stage) {
    const int first = channel + source_chunk * kElements;
    const int moved_y = tap_y * p.y.tap_move, moved_x = tap_x * p.x.tap_move;
#pragma unroll
    for (int i = 0; i < kSourceRows; ++i) {
      const int y = source_y[i] + moved_y, x = source_x[i] + moved_x;
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.y.src_size) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(p.x.src_size);
      const Bits* from = source[i] + y * p.source_y + x * p.source_x + first * p.source_c;
      if constexpr (kVector) {
        const bool valid = inside && first < p.source_channels;
        copy_async_16(stage + chunk_at(source_row + i * kPass, source_chunk),
                      valid ? from : source[i], valid);
      } else {
        source_held[i] = {0, 0, 0, 0};
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          if (inside && first + e < p.source_channels) put(source_held[i], e, from[e * p.source_c]);
        }
      }
    }
    const int tap = (p.y.tap_first + tap_y * p.y.tap_step) * p.filter_columns + p.x.tap_first +
                    tap_x * p.x.tap_step;
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      weight_held[i] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (weight[i] != nullptr && weight_channel[e] >= 0) {
          put(weight_held[i], e, weight[i][weight_channel[e] + tap]);
        }
      }
    }
  }

  __device__ void store(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kSourceRows && !kVector; ++i) {
      *reinterpret_cast<uint4*>(stage + chunk_at(source_row + i * kPass, source_chunk)) =
          source_held[i];
    }
    unsigned char* weights = stage + Shape::kRows * 64;
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      *reinterpret_cast<uint4*>(weights + chunk_at(weight_row + i * kPass, weight_chunk)) =
          weight_held[i];
    }
    advance();
  }

  __device__ void advance() {
    if (++tap_x < p.x.taps) return;
    tap_x = 0;
    if (++tap_y < p.y.taps) return;
    tap_y = 0;
    channel += kDepth;
    look_up_channels();
  }
};

template <typename T, typename Shape>
__device__ inline void write_sums(const ConvParams& p, const Sums<Shape>& sums, int first_pixel,
                                  int first_column, bool in_pairs) {
  using Bits = typename T::Bits;
  const Place<Shape> place;
  const int pixels = p.images * p.y.size * p.x.size;
  const int64_t* list = p.out_list;
  if (list != nullptr) list += blockIdx.z * p.out_list_stride;
  float bias[Shape::kSumsAcross][2];
#pragma unroll
  for (int j = 0; j < Shape::kSumsAcross; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = first_column + place.column + j * 8 + e;
      bias[j][e] = 0;
      if (p.bias != nullptr && column < p.out_channels) {
        const int64_t listed = list != nullptr ? list[column] : column;
        bias[j][e] = from_bits(T(), static_cast<const Bits*>(p.bias)[listed]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Shape::kSumsDown * 2; ++i) {
    const int number = first_pixel + place.row + i * 8;
    if (number >= pixels) break;
    const Pixel pixel(p, number);
    Bits* out = static_cast<Bits*>(p.out) + pixel.n * p.out_n +
                (static_cast<int64_t>(pixel.y) * p.y.out_step + p.y.out_first) * p.out_y +
                (static_cast<int64_t>(pixel.x) * p.x.out_step + p.x.out_first) * p.out_x;
#pragma unroll
    for (int j = 0; j < Shape::kSumsAcross; ++j) {
      const int column = first_column + place.column + j * 8;
      const Bits left = to_bits(T(), sums[i / 2][j][i % 2 * 2] + bias[j][0]);
      const Bits right = to_bits(T(), sums[i / 2][j][i % 2 * 2 + 1] + bias[j][1]);
      if (in_pairs) {  // channels are even then: both or none
        if (column < p.out_channels) {
          *reinterpret_cast<decltype(pair(left, right))*>(out + column) = pair(left, right);
        }
        continue;
      }
      if (column < p.out_channels) out[column * p.out_c] = left;
      if (column + 1 < p.out_channels) out[(column + 1) * p.out_c] = right;
    }
  }
}

// grid: (tiles of channels, then of pixels; 1; problems)
template <typename T, typename Shape, bool kVector>
__global__ void __launch_bounds__(Shape::kThreads)
    channel_conv2d_kernel(const ConvParams p, const int column_tiles, const bool in_pairs) {
  unsigned char* shared = shared_memory();
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Shape::kColumns;
  const int first_pixel = static_cast<int>(blockIdx.x / column_tiles) * Shape::kRows;
  Sums<Shape> sums = {};
  Fetcher<T, Shape, kVector> fetcher(p, first_pixel, first_column);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (!fetcher.done()) {
      fetcher.start(shared + stage * Shape::kStageBytes);
      fetcher.store(shared + stage * Shape::kStageBytes);
    }
    copy_async_commit();
  }
  const int depth = (p.source_channels + fetcher.kDepth - 1) / fetcher.kDepth;
  int read = 0, written = kStages - 1;
#pragma unroll 1
  for (int left = depth * p.y.taps * p.x.taps; left > 0; --left) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there, and nobody reads the one before any more
    unsigned char* next = shared + written * Shape::kStageBytes;
    const bool more = !fetcher.done();
    if (more) fetcher.start(next);
    copy_async_commit();
    const unsigned char* rows = shared + read * Shape::kStageBytes;
    multiply_stage<T, Shape>(sums, rows, rows + Shape::kRows * 64);
    if (more) fetcher.store(next);
    read = read + 1 == kStages ? 0 : read + 1;
    written = written + 1 == kStages ? 0 : written + 1;
  }
  copy_async_wait<0>();
  write_sums<T, Shape>(p, sums, first_pixel, first_column, in_pairs);
}

// --- launching ------------------------------------------------------------------------------------

inline bool multiple(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <typename T, typename Shape>
void launch_conv(const ConvParams& p, cudaStream_t stream) {
  constexpr int64_t kBytes = sizeof(typename T::Bits), kElements = 16 / kBytes;
  const int64_t pixels = static_cast<int64_t>(p.images) * p.y.size * p.x.size;
  const auto column_tiles = static_cast<int>(conv::ceil_div(p.out_channels, Shape::kColumns));
  const auto blocks = static_cast<unsigned>(column_tiles * conv::ceil_div(pixels, Shape::kRows));
  const dim3 grid(blocks, 1, static_cast<unsigned>(p.problems));
  const bool vector = p.source_c == 1 && p.source_channels % kElements == 0 &&
                      (p.source_n | p.source_y | p.source_x) % kElements == 0 &&
                      multiple(p.source, 16);
  const bool in_pairs = p.out_c == 1 && p.out_channels % 2 == 0 &&
                        (p.out_n | p.out_y | p.out_x) % 2 == 0 && multiple(p.out, 2 * kBytes);
  if (vector) {
    DCX_LAUNCH((channel_conv2d_kernel<T, Shape, true>), grid, Shape::kThreads, Shape::kSharedBytes,
               stream, p, column_tiles, in_pairs);
  } else {
    DCX_LAUNCH((channel_conv2d_kernel<T, Shape, false>), grid, Shape::kThreads,
               Shape::kSharedBytes, stream, p, column_tiles, in_pairs);
  }
}

template <typename T>
void channel_conv2d_of(const ConvParams& params, conv::Tile tile, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (tile) {
    case conv::Tile::k128x128: return launch_conv<T, Large>(params, on);
    case conv::Tile::k128x64: return launch_conv<T, Narrow>(params, on);
    case conv::Tile::k64x64: return launch_conv<T, Small>(params, on);
  }
}

}  // namespace dcx
