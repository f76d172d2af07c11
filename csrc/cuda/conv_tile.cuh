// What the convolution kernels share: shapes of tiles, chunks of 16 bytes, the product of a stage.
#pragma once

#include "cuda/mma.cuh"

namespace dcx {

constexpr int kStages = 3;
constexpr int kChunksOfRow = 4;  // a stage is 64 bytes deep: two steps of the tensor cores

// Shape of a block's tile, of warps of kWarpRows x 32.
template <int kRows_, int kColumns_, int kWarpRows_>
struct TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = 32;
  static constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kSumsDown = kWarpRows / 16, kSumsAcross = kWarpColumns / 8;
  static constexpr int kStageBytes = (kRows + kColumns) * 16 * kChunksOfRow;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 48 << 10, "more than a block has without asking");
};

using Large = TileShape<128, 128, 64>;
using Narrow = TileShape<128, 64, 64>;
using Small = TileShape<64, 64, 32>;

template <typename Shape>
using Sums = float[Shape::kSumsDown][Shape::kSumsAcross][4];

// Which 16 x 8 sums a thread has: 4 of each, in rows `row`, `row + 8` and columns `column`, + 1.
template <typename Shape>
struct Place {
  int row, column;
  __device__ Place() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    row = warp / Shape::kWarpsAcross * Shape::kWarpRows + lane / 4;
    column = warp % Shape::kWarpsAcross * Shape::kWarpColumns + lane % 4 * 2;
  }
};

// Put element `e` of a chunk in its place.
__device__ inline void put(uint4& chunk, int e, uint16_t bits) {
  uint32_t* words = &chunk.x;
  words[e / 2] |= static_cast<uint32_t>(bits) << 16 * (e % 2);
}
__device__ inline void put(uint4& chunk, int e, uint32_t bits) { (&chunk.x)[e] = bits; }

// Two neighbours of a row of output.
__device__ inline uint32_t pair(uint16_t a, uint16_t b) {
  return a | static_cast<uint32_t>(b) << 16;
}
__device__ inline uint2 pair(uint32_t a, uint32_t b) { return {a, b}; }

}  // namespace dcx
