// From threads to elements of a dense tensor, 16 bytes an access, and to their channels.
#pragma once

#include "batch_norm.h"
#include "launch.cuh"
#include "vectors.cuh"

namespace dcx::norm {

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <int kNumber>
struct Count {
  static constexpr int value = kNumber;
};

// Vectors from `at` on, `step` elements apart, as far as they are of elements [begin, end).
struct Walk {
  int64_t at, step, begin, end;
};

// Call some(Count<U>, at) for U whole vectors from `at` on, whose loads need not wait for each
// other, and edge(at, from, to) for elements [at + from, at + to) of a vector that is not whole.
template <int N, int kTogether, typename Some, typename Edge>
__device__ __forceinline__ void each_vector(const Walk& walk, Some some, Edge edge) {
  int64_t at = walk.at;
  if (at < walk.begin) {
    const int64_t left = walk.end - at;
    edge(at, static_cast<int>(walk.begin - at), static_cast<int>(left < N ? left : N));
    at += walk.step;
  }
  for (; at + (kTogether - 1) * walk.step + N <= walk.end; at += kTogether * walk.step) {
    some(Count<kTogether>(), at);
  }
  for (; at + N <= walk.end; at += walk.step) some(Count<1>(), at);
  if (at < walk.end) edge(at, 0, static_cast<int>(walk.end - at));
}

// What a thread has of rows of columns: one vector of every `rows.rows`-th row of a tile.
template <int N>
struct Place {
  Walk walk;
  int64_t tile;  // of all sets
  int column;    // its first, from the tile's aligned origin on
  int row;       // among those that the block has at a time
  int shift;     // elements between the origin and the tile
  bool exists;   // a last block may have fewer vectors

  // `span` periods in a set
  __device__ Place(const Rows& rows, int64_t span, int64_t period) {
    tile = blockIdx.x / rows.across;
    const int64_t set = tile / rows.tiles, first = set * span + tile % rows.tiles * rows.block;
    const int64_t past = (set + 1) * span;
    walk.begin = first * period;
    walk.end = (first + rows.block < past ? first + rows.block : past) * period;
    shift = static_cast<int>(walk.begin % N);
    row = threadIdx.x / rows.width;
    column = (blockIdx.x % rows.across * rows.width + threadIdx.x % rows.width) * N;
    exists = column < rows.columns;
    const int64_t offset = static_cast<int64_t>(row) * rows.columns + column;
    walk.at = exists ? walk.begin - shift + offset : walk.end;
    walk.step = static_cast<int64_t>(rows.rows) * rows.columns;
  }
};

// Columns of one channel follow each other, `run` at a time; channels repeat.
struct Channels {
  int count, run;
};

struct Column {
  int channel, pixel;
};

__device__ __forceinline__ Column column_of(const Channels& channels, int column, int shift) {
  const int period = channels.count * channels.run;  // of more than one: shift < N < 16
  const int from = shift == 0 ? column % period : (column + 16 * period - shift) % period;
  return {from / channels.run, from % channels.run};
}

// The channels' numbers of N columns.
template <int N, typename T>
__device__ __forceinline__ void spread(const T* vector, const Channels& channels, Column from,
                                       float (&to)[N]) {
  if (from.pixel + N <= channels.run) {
    const float value = to_float(vector[from.channel]);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = value;
    return;
  }
  if constexpr (sizeof(T) == 4) {
    if (channels.run == 1 && channels.count % 4 == 0 && aligned(vector)) {
#pragma unroll
      for (int quad = 0; quad < N; quad += 4) {
        Vector<T, 4> values;
        const int channel = from.channel + quad;
        load_vector(vector + (channel < channels.count ? channel : channel - channels.count),
                    values);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[quad + i] = values.at[i];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = to_float(vector[from.channel]);
    if (++from.pixel == channels.run) {
      from.pixel = 0;
      if (++from.channel == channels.count) from.channel = 0;
    }
  }
}

template <int N>
__device__ __forceinline__ void spread(const PerChannel& vector, float otherwise,
                                       const Channels& channels, Column from, float (&to)[N]) {
  if (vector.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = otherwise;
  } else if (vector.type == Type::kFloat) {
    spread(static_cast<const float*>(vector.data), channels, from, to);
  } else if (vector.type == Type::kHalf) {
    spread(static_cast<const __half*>(vector.data), channels, from, to);
  } else {
    spread(static_cast<const __nv_bfloat16*>(vector.data), channels, from, to);
  }
}

// h = (x - center) scale + shift of N columns.
template <int N>
struct Norm {
  float center[N], scale[N], shift[N];

  __device__ __forceinline__ Norm(const Vectors& vectors, const Channels& channels, Column from) {
    float invstd[N];
    spread(vectors.mean, channels, from, center);
    spread(vectors.invstd, channels, from, invstd);
    spread(vectors.weight, 1.0f, channels, from, scale);
    spread(vectors.bias, 0.0f, channels, from, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) scale[i] = __fmul_rn(invstd[i], scale[i]);
  }

  // Rounded alike forward and backward: the gradient is cut where the output is.
  __device__ __forceinline__ float operator()(int i, float x) const {
    return fmaf(x - center[i], scale[i], shift[i]);
  }
};

}  // namespace dcx::norm
