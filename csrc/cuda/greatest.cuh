// The nth greatest of many numbers, found by one block: a histogram of 8 bits of their keys a pass.
// Counts are integers, so that nothing depends on the order of threads.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace dcx {

// --- keys -----------------------------------------------------------------------------------------

// Unsigned keys in the order of numbers: NaN as -inf, -0 as 0. No key is 0 or ~0.
template <typename Bits>
__device__ __forceinline__ Bits order_bits(Bits bits, Bits infinity) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits size = bits & ~kSign;
  if (size > infinity) bits = infinity | kSign;
  if (size == 0) bits = 0;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

__device__ __forceinline__ uint64_t order_key(double x) {
  return order_bits<uint64_t>(__double_as_longlong(x), uint64_t{0x7ff} << 52);
}
template <typename T>
__device__ __forceinline__ uint32_t order_key(T x) {
  return order_bits<uint32_t>(__float_as_uint(to_float(x)), 0x7f800000u);
}

template <typename T>
struct KeyOf {
  using Type = uint32_t;
};
template <>
struct KeyOf<double> {
  using Type = uint64_t;
};

// --- what a block finds together ------------------------------------------------------------------

struct SelectShared {
  int counts[256];  // of digits
  int digit, nth;   // found in this pass; how many are still looked for
  int votes[32];    // of warps
};

struct Count {
  int before, all;
};

// How many threads before this one say yes, and how many do at all. Every thread takes part.
__device__ __forceinline__ Count count_votes(bool said, SelectShared& shared) {
  const unsigned votes = __ballot_sync(0xffffffffu, said);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 0) shared.votes[warp] = __popc(votes);
  __syncthreads();
  Count count{__popc(votes & ((1u << lane) - 1)), 0};
  for (int i = 0; i < warps; ++i) {
    const int theirs = shared.votes[i];
    if (i < warp) count.before += theirs;
    count.all += theirs;
  }
  __syncthreads();  // the next call writes
  return count;
}

// One warp: the digit of the nth greatest, and the how manieth of that digit it is.
__device__ __forceinline__ void find_digit(SelectShared& shared, int nth) {
  constexpr int kBins = 8;  // of a lane; lane 0 has the greatest digits
  const int lane = threadIdx.x;
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kBins; ++i) mine += shared.counts[255 - lane * kBins - i];
  int until = mine;  // of all lanes up to this one
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int theirs = __shfl_up_sync(0xffffffffu, until, by);
    if (lane >= by) until += theirs;
  }
  int before = until - mine;
  if (before >= nth || until < nth) return;  // of another lane
  for (int i = 0; i < kBins; ++i) {
    const int digit = 255 - lane * kBins - i, here = shared.counts[digit];
    if (before + here >= nth) {
      shared.digit = digit;
      shared.nth = nth - before;
      return;
    }
    before += here;
  }
}

template <typename Key>
struct Greatest {
  Key key;
  int ties;  // how many of those that equal it are among the greatest
};

// The nth greatest of key_at(0), ..., key_at(count - 1), 1 <= nth <= count; of none (nth 0) ~0.
template <typename Key, typename KeyAt>
__device__ __forceinline__ Greatest<Key> nth_greatest(KeyAt key_at, int count, int nth,
                                                      SelectShared& shared) {
  if (nth == 0) return {static_cast<Key>(~Key{0}), 0};
  Key found = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) shared.counts[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const Key key = key_at(i);
      // in two steps: a shift by all bits is undefined
      const bool same = (key ^ found) >> shift >> 8 == 0;
      if (same) atomicAdd(&shared.counts[key >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(shared, nth);
    __syncthreads();
    found |= static_cast<Key>(shared.digit) << shift;
    nth = shared.nth;
  }
  __syncthreads();  // the next search writes
  return {found, nth};
}

}  // namespace dcx
