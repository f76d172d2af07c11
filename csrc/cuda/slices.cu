#include "slices.h"

#include <algorithm>

#include "launch.cuh"
#include "slice_walk.cuh"

namespace dcx {
namespace {

template <typename Full, typename Packed, bool kScatter>
__global__ void __launch_bounds__(kSliceThreads<sizeof(Packed)>)
    move_slices_kernel(const int64_t* table, int count, int columns) {
  constexpr int N = kSliceVector<sizeof(Packed)>;
  const int64_t* line = find_slice(table, count, columns);
  const Places<N> places = find_places<N>(line);
  Full* full = global<Full>(line[kOwn]);
  Packed* packed = global<Packed>(line[kOwn + 1]);
  Vector<Packed, N> values{};
  if constexpr (kScatter) {
    load_packed(packed, places, values);
    store_full(full, places, values);
  } else {
    Vector<Full, N> found{};
    load_full(full, places, found);
#pragma unroll
    for (int i = 0; i < N; ++i) values.at[i] = Convert<Packed, Full>::of(found.at[i]);
    store_packed(packed, places, values);
  }
}

template <typename Full, typename Packed, bool kScatter>
void launch_move(const SliceMoves& moves, cudaStream_t stream) {
  DCX_LAUNCH((move_slices_kernel<Full, Packed, kScatter>), dim3(moves.blocks),
             dim3(kSliceThreads<sizeof(Packed)>), 0, stream, moves.table, moves.count,
             moves.columns);
}

// Moves without a cast copy bits: what matters of a type is its size.
template <typename Bits>
void launch_copy(const SliceMoves& moves, cudaStream_t stream) {
  if (moves.scatter) {
    launch_move<Bits, Bits, true>(moves, stream);
  } else {
    launch_move<Bits, Bits, false>(moves, stream);
  }
}

}  // namespace

void move_slices(const SliceMoves& moves, cudaStream_t stream) {
  if (moves.blocks == 0) return;
  if (moves.cast == Cast::kFloatToHalf) return launch_move<float, __half, false>(moves, stream);
  if (moves.cast == Cast::kFloatToBfloat16) {
    return launch_move<float, __nv_bfloat16, false>(moves, stream);
  }
  switch (moves.element_size) {
    case 1: return launch_copy<uint8_t>(moves, stream);
    case 2: return launch_copy<uint16_t>(moves, stream);
    case 4: return launch_copy<uint32_t>(moves, stream);
    default: return launch_copy<uint64_t>(moves, stream);
  }
}

}  // namespace dcx
