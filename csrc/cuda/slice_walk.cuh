// From a thread of a launch over many slices to its slice, and to its elements of that.
#pragma once

#include "launch/slices.h"
#include "vectors.cuh"

namespace dcx {

// An address out of the table. The compiler cannot know the kind of memory: LD and ST, not LDG, STG.
template <typename T>
__device__ __forceinline__ T* global(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// The line of this block's slice. A warp looks at 32 lines at once: two rounds find one of 1024.
__device__ __forceinline__ const int64_t* find_slice(const int64_t* table, int count, int columns) {
  const int lane = threadIdx.x % 32;
  const int64_t block = blockIdx.x;
  int low = 0;
  for (int lines = count; lines > 1;) {
    const int step = (lines + 31) / 32;
    const int line = low + lane * step;
    const bool before =
        lane * step < lines && table[static_cast<int64_t>(line) * columns + kFirstBlock] <= block;
    const int ahead = (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
    low += ahead;
    lines = lines - ahead < step ? lines - ahead : step;
  }
  return table + static_cast<int64_t>(low) * columns;
}

// N elements that follow each other in the packed slice, and where they are in the full tensor,
// which has less than 2^31 elements: wider places would cost 16-bit optimizers their registers.
template <int N>
struct Places {
  int full[N];
  int packed;     // the first one
  int count;      // how many there are: N but at the end, then less
  bool together;  // they follow each other in the full tensor too, from a multiple of N on
};

template <int N>
__device__ __forceinline__ Places<N> find_places(const int64_t* line) {
  Places<N> places;
  const int block = static_cast<int>(blockIdx.x - line[kFirstBlock]);
  places.packed = block * kSliceBlock + static_cast<int>(threadIdx.x) * N;
  const int left = static_cast<int>(line[kNumel]) - places.packed;
  places.count = left < N ? (left < 0 ? 0 : left) : N;
  const int64_t* outs = global<const int64_t>(line[kOutList]);
  const int64_t* ins = global<const int64_t>(line[kInList]);
  if (outs == nullptr && ins == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) places.full[i] = places.packed + i;
    places.together = places.count == N;
    return places;
  }
  const int row = static_cast<int>(line[kRow]), inner = static_cast<int>(line[kInner]);
  const int inputs = static_cast<int>(line[kInPerGroup]);
  const int channels = static_cast<int>(line[kChannels]);
  const int full_row = static_cast<int>(line[kFullRow]);
  int k = places.packed / row;  // divided once, then counted on
  int c = (places.packed - k * row) / inner;
  int pixel = places.packed - k * row - c * inner;
  bool fresh = true;
  int start = 0;  // of the pair of channels, in the full tensor
  places.together = places.count == N;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < places.count) {
      if (fresh) {
        int source = c;
        if (ins != nullptr) {
          const int group = k / static_cast<int>(line[kOutPerGroup]);
          source = static_cast<int>(ins[group * inputs + c]);
          if (source >= channels) source %= channels;  // of a group behind the first
        }
        start = (outs == nullptr ? k : static_cast<int>(outs[k])) * full_row + source * inner;
      }
      places.full[i] = start + pixel;
      fresh = ++pixel == inner;
      if (fresh) {
        pixel = 0;
        if (++c == inputs) {
          c = 0;
          ++k;
        }
      }
    } else {
      places.full[i] = 0;
    }
    places.together &= places.full[i] == places.full[0] + i;
  }
  places.together &= places.full[0] % N == 0;
  return places;
}

template <typename T, int N>
__device__ __forceinline__ void load_full(const T* full, const Places<N>& places,
                                          Vector<T, N>& values) {
  if (places.together && aligned(full)) {
    load_vector(full + places.full[0], values);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < places.count) values.at[i] = full[places.full[i]];
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_full(T* full, const Places<N>& places,
                                           const Vector<T, N>& values) {
  if (places.together && aligned(full)) {
    store_vector(full + places.full[0], values);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < places.count) full[places.full[i]] = values.at[i];
  }
}

template <typename T, int N>
__device__ __forceinline__ void load_packed(const T* packed, const Places<N>& places,
                                            Vector<T, N>& values) {
  packed += places.packed;
  if (places.count == N && aligned(packed)) {
    load_vector(packed, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < places.count) values.at[i] = packed[i];
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_packed(T* packed, const Places<N>& places,
                                             const Vector<T, N>& values) {
  packed += places.packed;
  if (places.count == N && aligned(packed)) {
    store_vector(packed, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < places.count) packed[i] = values.at[i];
  }
}

}  // namespace dcx
