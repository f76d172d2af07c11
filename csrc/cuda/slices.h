// Moves of the active slices of many tensors: one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcx {

enum class Cast { kNone, kFloatToHalf, kFloatToBfloat16 };

struct SliceMoves {
  const int64_t* table;  // lines of launch/slices.h; own columns: full address, packed address
  int count;             // lines
  int columns;           // of a line
  int blocks;
  int element_size;  // bytes, of the full tensors: 1, 2, 4 or 8
  bool scatter;      // packed -> full
  Cast cast;         // of what is gathered, from fp32
};

void move_slices(const SliceMoves& moves, cudaStream_t stream);

}  // namespace dcx
